"""The differentiable LoRA convolution. Saved for backward: X, XA (M, r, *out), dropout's seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.autograd.call import (
    again,
    batched,
    bias_of,
    check_dense,
    check_frozen,
    composed,
    derived,
    direct_apply,
    kind_of,
    number_scaling,
    transformed,
    vjp,
)
from lora_kernels.autograd.lora_linear import dropout_seed
from lora_kernels.errors import ConfigError, ShapeError
from lora_kernels.operands.dtypes import low_rank_dtype
from lora_kernels.reference import composition
from lora_kernels.reference.lora_conv import (
    ConvNeeds,
    Geometry,
    Mask,
    is_channels_last,
    lora_conv_bwd,
    lora_conv_fwd,
)


class _LoRAConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        X: Tensor,
        W: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        lora_bias: Tensor | None,
        seed: Tensor | None,
        call: tuple[float, Geometry, tuple[Any, ...]],
    ) -> Tensor:
        scaling, geometry, drawn = call
        Y, XA = lora_conv_fwd(
            X, W, A, B, bias, lora_bias, scaling, geometry, seed if seed is None else Mask(seed, *drawn)
        )
        ctx.save_for_backward(X, W, A, B, XA, seed)
        ctx.call = call
        ctx.lora_bias_dtype = None if lora_bias is None else lora_bias.dtype
        return Y

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        X, W, A, B, XA, seed = ctx.saved_tensors
        scaling, geometry, drawn = ctx.call
        N = W.shape[0]
        need_x, _, need_a, need_b, need_bias, need_lora_bias, *_ = ctx.needs_input_grad
        needs = ConvNeeds(need_x, need_a, need_b, need_bias, need_lora_bias)
        mask = None if seed is None else Mask(seed, *drawn)
        if again(dY):
            grads = vjp(
                lambda X, A, B, b, c: composition.lora_conv(X, W, A, B, b, c, scaling, geometry, mask),
                (X, A, B, bias_of(need_bias, X, N), bias_of(need_lora_bias, X, N, ctx.lora_bias_dtype)),
                needs,
                dY,
            )
            return grads[0], None, *grads[1:], None, None
        dX, dA, dB, dbias, dlora_bias = lora_conv_bwd(dY, X, W, A, B, XA, scaling, geometry, mask, needs)
        if dlora_bias is not None:
            dlora_bias = dlora_bias.to(ctx.lora_bias_dtype)
        return dX, None, dA, dB, dbias, dlora_bias, None, None


_apply = direct_apply(_LoRAConv)


def _each(given: int | Sequence[int], dims: int, name: str) -> tuple[int, ...]:
    each = (given,) * dims if isinstance(given, int) else tuple(given)
    if len(each) != dims or not all(isinstance(n, int) for n in each):
        raise ConfigError(f"{name}={given!r}; accepted is a whole number, or one for each of {dims} dimensions")
    return each


def _padding(
    given: int | str | Sequence[int], kernel: Sequence[int], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[int, ...]:
    """Padding as integers; accepts "valid", and "same" if it is equally wide on both sides."""
    if given == "valid":
        return (0,) * len(kernel)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if given == "same" and set(stride) == {1} and not any(n % 2 for n in reach):
        return tuple(n // 2 for n in reach)
    if isinstance(given, str):
        raise ConfigError(
            f"padding={given!r} with a kernel of {tuple(kernel)}, stride {stride}; accepted are whole numbers, "
            "'valid', and 'same' at stride 1 with as much on either side"
        )
    return _each(given, len(kernel), "padding")


def _check(
    X: Tensor, W: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, lora_bias: Tensor | None, groups: int
) -> None:
    check_frozen(W)
    check_dense(X)
    N, r = W.shape[0], A.shape[0]
    C = W.shape[1] * groups
    fits = 3 <= X.dim() <= 5 and W.dim() == A.dim() == B.dim() == X.dim() and X.shape[1] == C and r >= 1
    fits = fits and A.shape[1:] == (C, *W.shape[2:]) and r % groups == 0 and N % groups == 0
    if not fits or B.shape[:2] != (N, r // groups) or B[0, 0].numel() != 1:
        raise ShapeError(
            f"X {tuple(X.shape)}, W {tuple(W.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)} do not fit with {groups} "
            "groups: expected X (M, C, *in), W (N, C/groups, *k), A (r, C, *k), B (N, r/groups, *1), r and N divisible "
            "by groups"
        )
    for vector, name in ((bias, "bias"), (lora_bias, "lora_bias")):
        if vector is not None and vector.shape != (N,):
            raise ShapeError(f"{name} has shape {tuple(vector.shape)}; expected ({N},) or None")
    if not (X.is_floating_point() and A.is_floating_point() and B.is_floating_point()):
        raise ShapeError(f"X {X.dtype}, A {A.dtype}, B {B.dtype}: expected floating-point tensors")
    if X.dtype != W.dtype or (bias is not None and bias.dtype != X.dtype):
        given = f"X is {X.dtype}, W {W.dtype}" + ("" if bias is None else f", bias {bias.dtype}")
        raise ShapeError(f"{given}; they must share one dtype (only A and B may differ). Cast X, or use torch.autocast")
    if not X.device == W.device == A.device == B.device:
        raise ShapeError(f"X is on {X.device}, W on {W.device}, A on {A.device}, B on {B.device}; expected one device")


def lora_conv(
    X: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    *,
    lora_bias: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Y = conv(X, W) + bias + scaling * (conv1x1(conv(dropout(X), A), B) + lora_bias), in 1, 2 or 3 dimensions.

    Args:
        X: (M, C, *in), float64, float32, float16 or bfloat16; any strides (channels last is preserved), any M.
        W: (N, C/groups, *k) frozen, in X's dtype.
        A: (r, C, *k), B: (N, r/groups, *1): any float dtype, rounded to X's dtype (to float32 if that is float16); r
            divisible by groups. A's convolution has the base's stride, padding and dilation, and one group: PEFT's
            layout.
        bias: (N,) in X's dtype, or None. lora_bias: (N,) in any float dtype, or None.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r).
        dropout_p: probability that an element of A's input is zeroed while ``training``; the rest is scaled by
            1/(1-p).
        seed: fixes the mask, as in lora_linear; the mask and the dropped X are not saved but computed again.
        stride, dilation, groups: as torch.nn.functional.conv2d's; zeros are padded.
        padding: as there; "same" only if it is equally wide on both sides.

    Returns:
        Y (M, N, *out) in X's dtype (under torch.autocast in its dtype). Gradients flow to X, A, B, bias and lora_bias,
        to any order.

    Raises:
        FrozenWeightError: W requires a gradient.
        ShapeError: operands that do not fit together.
        ConfigError: a dropout_p outside [0, 1], a stride, padding or dilation that does not fit.
    """
    device_type = kind_of(X)
    if torch.is_autocast_enabled(device_type) and X.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        X, W = X.to(dtype), W.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(X, W, A, B, bias, lora_bias, groups)
    if not 0.0 <= dropout_p <= 1.0:
        raise ConfigError(f"dropout_p={dropout_p}; accepted is a probability from 0 to 1")
    kernel, dims = W.shape[2:], W.dim() - 2
    steps, holes = _each(stride, dims, "stride"), _each(dilation, dims, "dilation")
    geometry = Geometry(steps, _padding(padding, kernel, steps, holes), holes, groups)
    if type(scaling) is not float:
        factor, (A, scaling) = scaling, number_scaling(A, scaling)
        lora_bias = (
            lora_bias * factor.reshape(()) if lora_bias is not None and isinstance(factor, Tensor) else lora_bias
        )
    traced = transformed()
    composes = traced and derived()
    if traced and not composes:  # a number would be a constant of the graph, compiled again for each value
        B, lora_bias = B.to(low_rank_dtype(B.dtype)) * scaling, None if lora_bias is None else lora_bias * scaling
        scaling = 1.0
    B = B.flatten(1)
    state = dropout_seed(seed, X.device) if training and dropout_p > 0.0 else None
    channels_last = not (composes and batched(X)) and is_channels_last(X)
    drawn = dropout_p, channels_last, (traced and not composes) or device_type != "cpu"
    if composes:
        mask = None if state is None else Mask(state, *drawn)
        return composed(composition.lora_conv, X, W, A, B, bias, lora_bias, scaling, geometry, mask)
    if torch.is_grad_enabled():
        apply = _LoRAConv.apply if traced else _apply
        return apply(X, W, A, B, bias, lora_bias, state, (scaling, geometry, drawn))
    mask = None if state is None else Mask(state, *drawn)
    return lora_conv_fwd(X, W, A, B, bias, lora_bias, scaling, geometry, mask)[0]
