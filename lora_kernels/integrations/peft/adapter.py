"""Reads one adapter of a PEFT layer over a linear layer, a convolution or an embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import Identity

from lora_kernels.integrations.peft import why_not as conditions
from lora_kernels.integrations.peft.dora import is_dora, why_not_dora
from lora_kernels.integrations.peft.why_not import FLOATS, PLAIN

Part = tuple[Tensor, Tensor, Tensor | None, float, float]
"""A (r, K), B (N, r), lora_bias (N,) or None, scaling, and the present p of dropout."""


def read_adapter(layer: Any, name: str, dtype: torch.dtype, kind: type[nn.Module] = nn.Linear) -> Part | str:
    """Return the adapter ``name`` of the layer, or the reason why PEFT's own forward runs.

    A and B have the shapes in which the modules hold them: A (r, C, *k) and B (N, r/groups, *1) for a convolution,
    A (r, vocab) and B (N, r) for an embedding. For a linear layer this runs at each call.

    Args:
        dtype: of the input.
        kind: the class of lora_A and lora_B; nn.Embedding if A and B are parameters, without dropout and bias.
    """
    variants = layer.lora_variant
    if name in variants and not is_dora(layer, name):
        return f"{type(variants[name]).__name__} has no fused path"
    modules = layer._modules
    embedded = kind is nn.Embedding
    if embedded:
        bias, p = None, 0.0
        A, B = modules["lora_embedding_A"][name], modules["lora_embedding_B"][name]
    else:
        lora_A, lora_B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        dropout = modules["lora_dropout"]._modules[name]
        for module, called in ((lora_A, "lora_A"), (lora_B, "lora_B"), (dropout, "lora_dropout")):
            reason = conditions.module_reason(module, called)
            if reason is not None:
                return reason
        if type(lora_A) is not kind or type(lora_B) is not kind or lora_A._parameters["bias"] is not None:
            found = f"lora_A is a {type(lora_A).__name__}, lora_B a {type(lora_B).__name__}"
            return f"{found}; both must be nn.{kind.__name__}"
        if type(dropout) is nn.Dropout:
            if dropout.inplace:
                return "its dropout works in place"
            p = dropout.p if dropout.training else 0.0
        elif type(dropout) is Identity:
            p = 0.0
        else:
            return f"its dropout is a {type(dropout).__name__}"
        A, B = conditions.weight_of(lora_A), conditions.weight_of(lora_B)
        held = lora_B._parameters
        bias = held["bias"] if "bias" in held else conditions.weight_of(lora_B, "bias")
    plain = type(A) in PLAIN and type(B) in PLAIN and A.dtype in FLOATS and B.dtype in FLOATS and not A.is_meta
    if not plain or kind is not nn.Linear:  # one expression for a linear layer, which the host runs at each call
        prefix = "lora_embedding_" if embedded else "lora_"
        reason = conditions.weight_reason(A, prefix + "A") or conditions.weight_reason(B, prefix + "B")
        if reason is not None:
            return reason
    if conditions.unsavable(A):
        return conditions.UNSAVABLE
    if A.dtype is not dtype and not embedded and not getattr(layer, "cast_input_dtype_enabled", True):
        return "casting its input to the adapter's dtype is switched off"
    reason = why_not_dora(layer, name) if name in variants else None
    scaling = conditions.scaling_of(layer, name) if reason is None else reason
    return scaling if isinstance(scaling, str) else (A, B, bias, scaling, p)
