"""Runs PEFT's DoRA on nn.Linear and Conv1D by dora_linear: the call, and the conditions that DoRA adds."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora import dora
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_kernels.autograd.dora_linear import NormCache, dora_linear
from lora_kernels.integrations.peft import why_not as conditions

_norms: WeakKeyDictionary[nn.Module, NormCache] = WeakKeyDictionary()  # by lora_magnitude_vector[adapter]


def is_dora(layer: Linear, adapter: str) -> bool:
    """Return whether the adapter of this layer is PEFT's DoRA, not a variant derived from it."""
    return type(layer.lora_variant.get(adapter)) is DoraLinearVariant


def why_not_dora(layer: Linear, adapter: str) -> str | None:
    """Return why dora_forward cannot run a DoRA adapter that meets the conditions of a plain one; None if it can."""
    modules: Any = layer._modules
    if len(conditions.active_in(layer, modules["lora_A"]._modules)) != 1:
        return "DoRA and another adapter are active together: PEFT rescales what the adapters before it added"
    if layer.ephemeral_gpu_offload:
        return "DoRA with ephemeral_gpu_offload keeps its magnitude on the CPU"
    if modules["lora_B"]._modules[adapter]._parameters.get("bias") is not None:
        return "DoRA with lora_bias: PEFT counts that bias into the norm"
    magnitude = modules["lora_magnitude_vector"]._modules[adapter]
    if type(magnitude) is not dora.DoraLinearLayer:
        return f"its magnitude is a {type(magnitude).__name__}"
    if layer.fan_in_fan_out != (type(modules["base_layer"]) is Conv1D):
        return "fan_in_fan_out does not say how its base layer stores the weight"
    return conditions.module_reason(magnitude, "lora_magnitude_vector") or conditions.weight_reason(
        conditions.weight_of(magnitude), "lora_magnitude_vector"
    )


def dora_forward(layer: Linear, adapter: str, x: Tensor) -> Tensor:
    """Return y (..., N) for x (..., K), as PEFT's forward does, for a layer that meets all conditions."""
    modules: Any = layer._modules
    base, magnitude, dropout = (
        modules["base_layer"],
        modules["lora_magnitude_vector"]._modules[adapter],
        modules["lora_dropout"]._modules[adapter],
    )
    W: Any = conditions.base_weight(base)
    A: Any = conditions.weight_of(modules["lora_A"]._modules[adapter])
    B: Any = conditions.weight_of(modules["lora_B"]._modules[adapter])
    m: Any = conditions.weight_of(magnitude)
    dropped = layer.training and dropout.training and type(dropout) is nn.Dropout
    return dora_linear(
        x,
        W.t() if type(base) is Conv1D else W,
        A,
        B,
        m,
        conditions.weight_of(base, "bias"),
        scaling=float(layer.scaling[adapter]),
        dropout_p=dropout.p if dropped else 0.0,
        norms=None if torch.compiler.is_compiling() else _norms_of(magnitude),
        trust=not layer.training and getattr(dora, "ENABLE_DORA_CACHING", False),  # since PEFT 0.19
    )


def _norms_of(magnitude: nn.Module) -> NormCache:
    """Return the norm cache of a magnitude. It is stored outside the module, so that copies and pickles omit it."""
    cache = _norms.get(magnitude)
    if cache is None:
        cache = _norms[magnitude] = NormCache()
    return cache
