"""Gives the LoRA layers of a PEFT model fused forwards, in place, and removes them again.

A layer keeps its object and everything in it. Only its class changes, to a subclass that adds a forward. The tuner's
class changes too, so that layers which PEFT makes later are fused as well.
"""

from __future__ import annotations

import os
import re
import warnings
import weakref
from collections import Counter
from typing import Any

import peft
from peft.tuners.lora import model as lora
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, Linear, LoraLayer
from peft.tuners.mixed import model as mixed
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lora_kernels.errors import ConfigError
from lora_kernels.integrations.peft.conv import FastConv1d, FastConv2d, FastConv3d
from lora_kernels.integrations.peft.embedding import FastEmbedding
from lora_kernels.integrations.peft.groups import dissolve, form_groups
from lora_kernels.integrations.peft.linear import CALLS, ROOT, UNCALLED, FusedLinear
from lora_kernels.integrations.peft.mlp import dissolve_mlps, form_mlps, mlps_of
from lora_kernels.integrations.peft.report import mark_uncalled, report, row
from lora_kernels.models.explain import DESCRIBERS, Columns, unwrap
from lora_kernels.models.fast_paths import switch_off, switch_on

SWITCH = "LORA_KERNELS_ACCELERATE"
KNOWN = ((0, 17), (0, 21))  # first and last tested version of PEFT
GROUP = "_lora_grouped"  # in a tuner's __dict__: the ``group`` argument of accelerate
_warned: set[str] = set()


class LoraModel(lora.LoraModel):
    """PEFT's LoraModel that also fuses layers added with later adapters. PEFT reports the name of this class."""

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Call PEFT's inject_adapter, then fuse the new layers of the model."""
        super().inject_adapter(model, *args, **kwargs)
        refresh(model, self.__dict__.get(GROUP, True))


class MixedModel(mixed.MixedModel):
    """PEFT's MixedModel, for adapters of several methods, that also fuses LoRA layers added with later adapters."""

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Call PEFT's inject_adapter, then fuse the new layers of the model."""
        super().inject_adapter(model, *args, **kwargs)
        refresh(model, self.__dict__.get(GROUP, True))


FUSED: dict[type, type] = {Linear: FusedLinear, Embedding: FastEmbedding}
FUSED |= {Conv1d: FastConv1d, Conv2d: FastConv2d, Conv3d: FastConv3d}
TUNERS: dict[type, type] = {lora.LoraModel: LoraModel, mixed.MixedModel: MixedModel}


class Root:
    """Hold a weak reference to the accelerated model, in one of its layers, if the model has no tuner of PEFT's.

    A copy of the model gets its own. A pickle of a layer holds an empty one, so that it does not contain the model.
    """

    def __init__(self, model: nn.Module | None = None, group: bool = True) -> None:
        self.model = None if model is None else weakref.ref(model)
        self.group = group

    def refresh(self) -> None:
        """Fuse the new layers of the model."""
        model = None if self.model is None else self.model()
        if model is not None:
            refresh(model, self.group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Root:
        return Root(None if self.model is None else memo.get(id(self.model())), self.group)

    def __reduce__(self) -> tuple[Any, ...]:
        return Root, ()


def accelerate(model: nn.Module, *, strict: bool = False, group: bool = True, verbose: bool = True) -> nn.Module:
    """Make PEFT's LoRA layers in ``model`` run fused, in place.

    They stay PEFT layers: names, parameters, state_dict, and every method of PEFT work as before. PEFT's own forward
    runs each layer and each call that cannot be fused; lora_kernels.explain(model) shows the reasons.

    Args:
        model: a PeftModel, or any model that PEFT injected layers into; torch.compile or DDP may wrap it.
        strict: raise if a layer is not fused in its present state, or if there is none.
        group: run layers that are found to read one input (q, k, v; gate, up) in one call, and gated MLPs in one call
            in training.
        verbose: print "n of m layers fused, the others because ...".

    Returns:
        The same model. A second call only fuses new layers and applies ``group``. With LORA_KERNELS_ACCELERATE=0 in
        the environment nothing changes, and a line says so.

    Raises:
        ConfigError: ``strict`` is set and a layer is not fused, or there is none. The model is then unchanged.
    """
    if os.environ.get(SWITCH) == "0":
        print(f"lora_kernels: {SWITCH}=0, the model keeps PEFT's own forwards")
        return model
    _check_version(peft.__version__)
    changed = swap(model)
    summary = report(model, FUSED)
    if strict and (summary.others or not summary.layers):
        for module in changed:
            module.__class__ = _restored(type(module))
            module.__dict__.pop(UNCALLED, None)
        raise ConfigError(f"strict=True, and {summary}")
    (form_groups if group else dissolve)(model)
    if group:
        form_mlps(model)
    else:
        dissolve_mlps(model)
    _remember(unwrap(model), group)
    switch_off(model, lambda module: isinstance(module, BaseTunerLayer))
    if verbose:
        print(f"lora_kernels: {summary}")
        for runs, count in Counter(names.describe() for names in mlps_of(model).values()).items():
            print(f"lora_kernels: {count} gated MLPs run whole in training, {runs}")
    return model


def decelerate(model: nn.Module) -> nn.Module:
    """Restore PEFT's own class of every layer that accelerate changed, in place; return the same model."""
    dissolve(model)
    dissolve_mlps(model)
    for module in model.modules():
        kind = _restored(type(module))
        if kind is not type(module):
            module.__class__ = kind
        for name in (CALLS, ROOT, GROUP, UNCALLED):
            module.__dict__.pop(name, None)
    switch_on(model)
    return model


def refresh(model: nn.Module, group: bool = True) -> None:
    """Fuse the new layers of an accelerated model."""
    new = swap(model)
    switch_off(model, lambda module: isinstance(module, BaseTunerLayer))
    if new and group:
        form_groups(model)
        form_mlps(model)


def swap(model: nn.Module) -> list[nn.Module]:
    """Change the class of every layer and tuner that has a fused one; return the changed modules."""
    changed = []
    for module in model.modules():
        fused = FUSED.get(type(module)) or TUNERS.get(type(module))
        if fused is not None:
            module.__class__ = fused
            changed.append(module)
    mark_uncalled(model)
    return changed


def _remember(model: nn.Module, group: bool) -> None:
    """Prepare for layers added later: the tuner fuses them; if PEFT discarded the tuner, one layer with a Root does."""
    tuners = [module for module in model.modules() if type(module) in TUNERS.values()]
    for tuner in tuners:
        tuner.__dict__[GROUP] = group
    if not tuners:
        layers = [module for module in model.modules() if isinstance(module, FusedLinear)]
        for layer in layers:
            layer.__dict__.pop(ROOT, None)
        for layer in layers[:1]:
            layer.__dict__[ROOT] = Root(model, group)


def describe(module: nn.Module) -> Columns | None:
    """Return the row of a PEFT LoRA layer in lora_kernels.explain; None for any other module."""
    return row(module, FUSED) if isinstance(module, LoraLayer) else None


DESCRIBERS.append(describe)


def _restored(kind: type) -> type:
    """Return the class before accelerate; ``kind`` itself if it is not one of ours."""
    return next((own for own, fused in (FUSED | TUNERS).items() if fused is kind), kind)


def _check_version(version: str) -> None:
    """Warn once if this version of PEFT was not tested."""
    found = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if not KNOWN[0] <= found <= KNOWN[1] and version not in _warned:
        _warned.add(version)
        tried = " to ".join(".".join(map(str, known)) for known in KNOWN)
        warnings.warn(f"PEFT {version} was not tried with lora_kernels.accelerate ({tried} were)", stacklevel=3)
