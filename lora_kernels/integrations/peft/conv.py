"""Runs PEFT's LoRA layers over nn.Conv1d, nn.Conv2d and nn.Conv3d by lora_conv, forward and backward.

    y = conv(x, W) + bias + sum over active adapters of scaling_i * (conv1x1(conv(dropout(x), A_i), B_i) + lora_bias_i)

Several adapters of an ungrouped convolution run as one: A and scaling * B are concatenated, as in linear.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d
from torch import Tensor, nn

from lora_kernels.autograd.lora_conv import lora_conv
from lora_kernels.integrations.peft import why_not as conditions
from lora_kernels.integrations.peft.adapter import read_adapter
from lora_kernels.integrations.peft.linear import ExplainMixin, count_peft_call
from lora_kernels.operands.dtypes import low_rank_dtype

PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ConvOperands(NamedTuple):
    """Operands and keywords of one lora_conv call."""

    W: Tensor
    A: Tensor
    B: Tensor
    bias: Tensor | None
    lora_bias: Tensor | None
    scaling: float
    dropout_p: float


def operands(layer: Any, x: Tensor | None = None) -> ConvOperands | str:
    """Return the operands of the layer in its present state, for the input ``x`` if given, or the reason why PEFT's own
    forward runs."""
    reason = conditions.state_reason(layer)
    if reason is not None:
        return reason
    base: Any = layer._modules["base_layer"]
    reason = _base_reason(base) or conditions.module_reason(base, "base_layer")
    if reason is not None:
        return reason
    names = conditions.active_in(layer, layer._modules["lora_A"]._modules)
    if not names:
        return "no adapter of it is active"
    W = conditions.base_weight(base)
    reason = conditions.weight_reason(W, "base_layer")
    if reason is not None:
        return reason
    assert W is not None
    if W.requires_grad:
        return "its base weight requires a gradient"
    if x is not None:
        reason = conditions.input_reason(x, W) or conditions.call_reason()
        if reason is not None:
            return reason
        if x.dim() != W.dim() or x.shape[1] != base.in_channels:
            return f"its input is {tuple(x.shape)}: no batch of {base.in_channels} channels"
    parts = []
    for name in names:
        part = read_adapter(layer, name, W.dtype if x is None else x.dtype, type(base))
        if isinstance(part, str):
            return part
        reason = _geometry_reason(base, *(layer._modules[key]._modules[name] for key in ("lora_A", "lora_B")))
        if reason is not None:
            return reason
        parts.append(part)
    A, B, lora_bias, scaling, p = parts[0]
    if len(parts) > 1:
        if base.groups > 1:
            return "several adapters are active on a grouped convolution"
        if any(part[-1] > 0.0 for part in parts):
            return "several adapters are active with a dropout each"
        A = torch.cat([a for a, *_ in parts])
        B = torch.cat([b.to(low_rank_dtype(b.dtype)) * s for _, b, _, s, _ in parts], 1)
        biases = [b * s for _, _, b, s, _ in parts if b is not None]
        lora_bias, scaling = torch.stack(biases).sum(0) if biases else None, 1.0
    return ConvOperands(W, A, B, conditions.weight_of(base, "bias"), lora_bias, scaling, p)


def _base_reason(base: nn.Module) -> str | None:
    """Return why lora_conv would not compute what the base layer does, or None."""
    if type(base) not in PLAIN:
        if nn.utils.parametrize.is_parametrized(base):
            return "its base layer is parametrized"
        return f"its base layer is a {type(base).__module__}.{type(base).__name__}"
    conv: Any = base
    if conv.padding_mode != "zeros":
        return f"padding_mode is {conv.padding_mode!r}, which PEFT applies to the base alone"
    wide = [d * (k - 1) % 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return "padding='same' is wider on one side" if conv.padding == "same" and any(wide) else None


def _geometry_reason(base: Any, lora_A: Any, lora_B: Any) -> str | None:
    """Return why lora_A's geometry is not the base's, or lora_B is not a pointwise convolution; None if they are."""
    for name in ("kernel_size", "stride", "padding"):
        if getattr(lora_A, name) != getattr(base, name):
            return f"lora_A's {name} is {getattr(lora_A, name)}, the base layer's {getattr(base, name)}"
    if lora_A.dilation != base.dilation and set(base.kernel_size) != {1}:
        return f"lora_A's dilation is {lora_A.dilation}, the base layer's {base.dilation}"
    ones = (1,) * len(base.stride)
    single = lora_B.kernel_size == lora_B.stride == ones and not any(lora_B.padding) and lora_A.groups == 1
    return (
        None if single and lora_B.groups == base.groups else "lora_A or lora_B has other groups or strides than PEFT's"
    )


class _FastConv(ExplainMixin, nn.Module):
    """Put lora_conv in front of PEFT's forward, for a convolution of any number of dimensions."""

    operands = staticmethod(operands)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return y (M, N, *out) for x (M, C, *in). PEFT's forward runs a call that cannot be fused; its reason is
        counted."""
        found = conditions.kwargs_reason(args, kwargs) if args or kwargs else operands(self, x)
        if isinstance(found, str):
            count_peft_call(self, found)
            return super().forward(x, *args, **kwargs)
        W, A, B, bias, lora_bias, scaling, p = found
        base: Any = self._modules["base_layer"]
        geometry = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation, "groups": base.groups}
        return lora_conv(x, W, A, B, bias, lora_bias=lora_bias, scaling=scaling, dropout_p=p, **geometry)


class FastConv1d(_FastConv, Conv1d):
    """peft.tuners.lora.layer.Conv1d with lora_conv as its forward. accelerate assigns this class; it is never built."""


class FastConv2d(_FastConv, Conv2d):
    """peft.tuners.lora.layer.Conv2d with lora_conv as its forward. accelerate assigns this class; it is never built."""


class FastConv3d(_FastConv, Conv3d):
    """peft.tuners.lora.layer.Conv3d with lora_conv as its forward. accelerate assigns this class; it is never built."""
