"""PEFT's LoRA layers over nn.Conv1d, nn.Conv2d and nn.Conv3d, with the forward and backward of lora_conv.

    y = conv(x, W) + bias + sum over active adapters of scaling_i * (conv1x1(conv(dropout(x), A_i), B_i) + lora_bias_i)

Several adapters of an ungrouped convolution are one, A and scaling * B side by side, as in linear.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d
from torch import Tensor, nn
from torch.nn.modules.linear import Identity

from lora_kernels.autograd.lora_conv import lora_conv
from lora_kernels.integrations.peft import why_not as conditions
from lora_kernels.integrations.peft.linear import Told, count_peft_call
from lora_kernels.operands.dtypes import low_rank_dtype

PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ConvOperands(NamedTuple):
    """What one fused call reads: the operands and keywords of lora_conv."""

    W: Tensor
    A: Tensor
    B: Tensor
    bias: Tensor | None
    lora_bias: Tensor | None
    scaling: float
    dropout_p: float


def operands(layer: Any, x: Tensor | None = None) -> ConvOperands | str:
    """What the fused path reads of the layer in its present state, for the input ``x`` if given, or the reason why
    PEFT's own forward runs."""
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
        part = _adapter(layer, base, name, W.dtype if x is None else x.dtype)
        if isinstance(part, str):
            return part
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
    """Why lora_conv would not compute what the base layer does."""
    if type(base) not in PLAIN:
        if nn.utils.parametrize.is_parametrized(base):
            return "its base layer is parametrized"
        return f"its base layer is a {type(base).__module__}.{type(base).__name__}"
    conv: Any = base
    if conv.padding_mode != "zeros":
        return f"padding_mode is {conv.padding_mode!r}, which PEFT applies to the base alone"
    wide = [d * (k - 1) % 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return "padding='same' is wider on one side" if conv.padding == "same" and any(wide) else None


def _adapter(
    layer: Any, base: Any, name: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, float, float] | str:
    """A (r, C, *k), B (N, r/groups, *1), lora_bias (N,) or None, scaling and dropout's present p of one adapter, or
    why PEFT's own forward has to run it."""
    if name in layer.lora_variant:
        return f"{type(layer.lora_variant[name]).__name__} has no fused path"
    modules = layer._modules
    lora_A, lora_B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    dropout = modules["lora_dropout"]._modules[name]
    for module, called in ((lora_A, "lora_A"), (lora_B, "lora_B"), (dropout, "lora_dropout")):
        reason = conditions.module_reason(module, called)
        if reason is not None:
            return reason
    reason = _geometry_reason(base, lora_A, lora_B)
    if reason is not None:
        return reason
    A, B = conditions.weight_of(lora_A), conditions.weight_of(lora_B)
    reason = conditions.weight_reason(A, "lora_A") or conditions.weight_reason(B, "lora_B")
    if reason is not None:
        return reason
    assert A is not None
    assert B is not None
    if conditions.unsavable(A):
        return conditions.UNSAVABLE
    if A.dtype is not dtype and not getattr(layer, "cast_input_dtype_enabled", True):
        return "casting its input to the adapter's dtype is switched off"
    if type(dropout) is nn.Dropout and not dropout.inplace:
        p = dropout.p if dropout.training else 0.0
    elif type(dropout) is Identity:
        p = 0.0
    else:
        return f"its dropout is a {type(dropout).__name__}, in place or of another kind than nn.Dropout"
    scaling = conditions.scaling_of(layer, name)
    return scaling if isinstance(scaling, str) else (A, B, conditions.weight_of(lora_B, "bias"), scaling, p)


def _geometry_reason(base: Any, lora_A: Any, lora_B: Any) -> str | None:
    """Why lora_A does not run over x as the base does, or lora_B not at single places."""
    if type(lora_A) is not type(base) or type(lora_B) is not type(base) or lora_A._parameters["bias"] is not None:
        return f"lora_A is a {type(lora_A).__name__}, lora_B a {type(lora_B).__name__}; plain is the base's own kind"
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


def _forward(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The fused forward, or None, the reason counted, where the call is PEFT's own."""
    found = conditions.kwargs_reason(args, kwargs) if args or kwargs else operands(layer, x)
    if isinstance(found, str):
        count_peft_call(layer, found)
        return None
    W, A, B, bias, lora_bias, scaling, p = found
    base = layer._modules["base_layer"]
    geometry = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation, "groups": base.groups}
    return lora_conv(x, W, A, B, bias, lora_bias=lora_bias, scaling=scaling, dropout_p=p, **geometry)


class _Conv(Told):
    operands = staticmethod(operands)


class FusedConv1d(_Conv, Conv1d):
    """peft.tuners.lora.layer.Conv1d whose forward is lora_conv wherever that computes the same. Never built."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y (M, N, out) for x (M, C, in)."""
        y = _forward(self, x, args, kwargs)
        return super().forward(x, *args, **kwargs) if y is None else y


class FusedConv2d(_Conv, Conv2d):
    """peft.tuners.lora.layer.Conv2d whose forward is lora_conv wherever that computes the same. Never built."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y (M, N, out, out) for x (M, C, in, in)."""
        y = _forward(self, x, args, kwargs)
        return super().forward(x, *args, **kwargs) if y is None else y


class FusedConv3d(_Conv, Conv3d):
    """peft.tuners.lora.layer.Conv3d whose forward is lora_conv wherever that computes the same. Never built."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y (M, N, out, out, out) for x (M, C, in, in, in)."""
        y = _forward(self, x, args, kwargs)
        return super().forward(x, *args, **kwargs) if y is None else y
