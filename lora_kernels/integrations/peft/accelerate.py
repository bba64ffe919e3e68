"""Give the LoRA layers of a PEFT model fused forwards, in place, and take them back.

A layer keeps its object and everything in it; only its class changes, to a subclass that adds nothing but a forward.
So does the tuner's class, which lets layers that PEFT makes later be picked up.
"""

from __future__ import annotations

import os
import re
import warnings
from typing import Any

import peft
from peft.tuners.lora.layer import Embedding, Linear
from peft.tuners.lora.model import LoraModel
from peft.tuners.mixed.model import MixedModel
from torch import nn

from lora_kernels.errors import ConfigError
from lora_kernels.integrations.peft.embedding import FusedEmbedding
from lora_kernels.integrations.peft.linear import CALLS, FusedLinear
from lora_kernels.integrations.peft.report import report

SWITCH = "LORA_KERNELS_ACCELERATE"
KNOWN = ((0, 17), (0, 21))  # PEFT's versions that were tried, first and last
_warned: set[str] = set()


class FusedLoraModel(LoraModel):
    """LoraModel that fuses the layers which an adapter added later brings."""

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, then a walk over the model."""
        super().inject_adapter(model, *args, **kwargs)
        swap(model)


class FusedMixedModel(MixedModel):
    """MixedModel (adapters of several methods) that fuses the LoRA layers which an adapter added later brings."""

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, then a walk over the model."""
        super().inject_adapter(model, *args, **kwargs)
        swap(model)


FUSED: dict[type, type] = {Linear: FusedLinear, Embedding: FusedEmbedding}
TUNERS: dict[type, type] = {LoraModel: FusedLoraModel, MixedModel: FusedMixedModel}


def accelerate(model: nn.Module, *, strict: bool = False, group: bool = True, verbose: bool = True) -> nn.Module:
    """Let PEFT's LoRA layers in ``model`` run fused, in place.

    They stay PEFT layers: names, parameters, state_dict, and every method of PEFT work as before. What has no fused
    path takes PEFT's own forward, layer by layer and call by call; lora_kernels.explain(model) gives the reasons.

    Args:
        model: a PeftModel, or any model that PEFT injected layers into; wrapped by torch.compile or DDP or not.
        strict: raise if a layer is not fused in its present state.
        group: let layers that read one input (q, k, v; gate, up) compute together, where structure allows it.
        verbose: print "n of m layers fused, the others because ...".

    Returns:
        The same model. A second call changes nothing but picks up layers that are new. With LORA_KERNELS_ACCELERATE=0
        in the environment nothing is changed, and that is printed.

    Raises:
        ConfigError: ``strict`` and layers that are not fused; the model is then as it was before.
    """
    if os.environ.get(SWITCH) == "0":
        print(f"lora_kernels: {SWITCH}=0, the model keeps PEFT's own forwards")
        return model
    _check_version(peft.__version__)
    changed = swap(model)
    told = report(model)
    if strict and (told.others or not told.layers):
        for module in changed:
            module.__class__ = _restored(type(module))
        raise ConfigError(f"strict=True, and {told}")
    if verbose:
        print(f"lora_kernels: {told}")
    return model


def decelerate(model: nn.Module) -> nn.Module:
    """Give PEFT's own classes back to every layer that accelerate changed, in place; returns the same model."""
    for module in model.modules():
        module.__class__ = _restored(type(module))
        module.__dict__.pop(CALLS, None)
    return model


def swap(model: nn.Module) -> list[nn.Module]:
    """Change the class of every layer and tuner that has a fused one; gives those that were changed."""
    changed = []
    for module in model.modules():
        fused = FUSED.get(type(module)) or TUNERS.get(type(module))
        if fused is not None:
            module.__class__ = fused
            changed.append(module)
    return changed


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
