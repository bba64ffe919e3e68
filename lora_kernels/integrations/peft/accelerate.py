"""Give the LoRA layers of a PEFT model fused forwards, in place, and take them back.

A layer keeps its object and everything in it; only its class changes, to a subclass that adds nothing but a forward.
So does the tuner's class, which lets layers that PEFT makes later be picked up.
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
from lora_kernels.integrations.peft.conv import FusedConv1d, FusedConv2d, FusedConv3d
from lora_kernels.integrations.peft.embedding import FusedEmbedding
from lora_kernels.integrations.peft.groups import dissolve, form_groups
from lora_kernels.integrations.peft.linear import CALLS, ROOT, UNCALLED, FusedLinear
from lora_kernels.integrations.peft.mlp import dissolve_mlps, form_mlps, mlps_of
from lora_kernels.integrations.peft.report import mark_uncalled, report, row
from lora_kernels.models.explain import DESCRIBERS, Columns, unwrap
from lora_kernels.models.fast_paths import switch_off, switch_on

SWITCH = "LORA_KERNELS_ACCELERATE"
KNOWN = ((0, 17), (0, 21))  # PEFT's versions that were tried, first and last
GROUP = "_lora_grouped"  # in a tuner's __dict__: whether accelerate was to form groups
_warned: set[str] = set()


class LoraModel(lora.LoraModel):
    """PEFT's, fusing the layers which an adapter added later brings. PEFT reports its tuner by the class's name."""

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, then a walk over the model."""
        super().inject_adapter(model, *args, **kwargs)
        refresh(model, self.__dict__.get(GROUP, True))


class MixedModel(mixed.MixedModel):
    """PEFT's for adapters of several methods, fusing the LoRA layers which an adapter added later brings."""

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, then a walk over the model."""
        super().inject_adapter(model, *args, **kwargs)
        refresh(model, self.__dict__.get(GROUP, True))


FUSED: dict[type, type] = {Linear: FusedLinear, Embedding: FusedEmbedding}
FUSED |= {Conv1d: FusedConv1d, Conv2d: FusedConv2d, Conv3d: FusedConv3d}
TUNERS: dict[type, type] = {lora.LoraModel: LoraModel, mixed.MixedModel: MixedModel}


class Root:
    """The model that accelerate was given, kept by one of its layers where PEFT keeps no tuner with the model.

    A copy of the model has one of its own; in a pickle it is empty, so that a layer does not drag its model along.
    """

    def __init__(self, model: nn.Module | None = None, group: bool = True) -> None:
        self.model = None if model is None else weakref.ref(model)
        self.group = group

    def refresh(self) -> None:
        """Fuse what is new in the model."""
        model = None if self.model is None else self.model()
        if model is not None:
            refresh(model, self.group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Root:
        return Root(None if self.model is None else memo.get(id(self.model())), self.group)

    def __reduce__(self) -> tuple[Any, ...]:
        return Root, ()


def accelerate(model: nn.Module, *, strict: bool = False, group: bool = True, verbose: bool = True) -> nn.Module:
    """Let PEFT's LoRA layers in ``model`` run fused, in place.

    They stay PEFT layers: names, parameters, state_dict, and every method of PEFT work as before. What has no fused
    path takes PEFT's own forward, layer by layer and call by call; lora_kernels.explain(model) gives the reasons.

    Args:
        model: a PeftModel, or any model that PEFT injected layers into; wrapped by torch.compile or DDP or not.
        strict: raise if a layer is not fused in its present state, or if there is none.
        group: let layers that read one input (q, k, v; gate, up) compute together, where they turn out to, and gated
            MLPs run whole in training.
        verbose: print "n of m layers fused, the others because ...".

    Returns:
        The same model. A second call changes nothing but picks up layers that are new, and ``group``. With
        LORA_KERNELS_ACCELERATE=0 in the environment nothing is changed, and that is printed.

    Raises:
        ConfigError: ``strict`` and layers that are not fused; the model is then as it was before.
    """
    if os.environ.get(SWITCH) == "0":
        print(f"lora_kernels: {SWITCH}=0, the model keeps PEFT's own forwards")
        return model
    _check_version(peft.__version__)
    changed = swap(model)
    told = report(model, FUSED)
    if strict and (told.others or not told.layers):
        for module in changed:
            module.__class__ = _restored(type(module))
            module.__dict__.pop(UNCALLED, None)
        raise ConfigError(f"strict=True, and {told}")
    (form_groups if group else dissolve)(model)
    if group:
        form_mlps(model)
    else:
        dissolve_mlps(model)
    _remember(unwrap(model), group)
    switch_off(model, lambda module: isinstance(module, BaseTunerLayer))
    if verbose:
        print(f"lora_kernels: {told}")
        for runs, count in Counter(names.describe() for names in mlps_of(model).values()).items():
            print(f"lora_kernels: {count} gated MLPs run whole in training, {runs}")
    return model


def decelerate(model: nn.Module) -> nn.Module:
    """Give PEFT's own classes back to every layer that accelerate changed, in place; returns the same model."""
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
    """Fuse the layers that are new in an accelerated model."""
    new = swap(model)
    switch_off(model, lambda module: isinstance(module, BaseTunerLayer))
    if new and group:
        form_groups(model)
        form_mlps(model)


def swap(model: nn.Module) -> list[nn.Module]:
    """Change the class of every layer and tuner that has a fused one; gives those that were changed."""
    changed = []
    for module in model.modules():
        fused = FUSED.get(type(module)) or TUNERS.get(type(module))
        if fused is not None:
            module.__class__ = fused
            changed.append(module)
    mark_uncalled(model)
    return changed


def _remember(model: nn.Module, group: bool) -> None:
    """Have layers that come later picked up: by the tuner, or where PEFT threw that away by a layer that knows."""
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
    """The row of a PEFT LoRA layer in lora_kernels.explain; None for any other module."""
    return row(module, FUSED) if isinstance(module, LoraLayer) else None


DESCRIBERS.append(describe)


def _restored(kind: type) -> type:
    """The class that accelerate found; ``kind`` itself where it is none of ours."""
    return next((own for own, fused in (FUSED | TUNERS).items() if fused is kind), kind)


def _check_version(version: str) -> None:
    """Warn, once a version, where PEFT is one that was not tried."""
    found = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if not KNOWN[0] <= found <= KNOWN[1] and version not in _warned:
        _warned.add(version)
        tried = " to ".join(".".join(map(str, known)) for known in KNOWN)
        warnings.warn(f"PEFT {version} was not tried with lora_kernels.accelerate ({tried} were)", stacklevel=3)
