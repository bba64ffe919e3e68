"""The differentiable DoRA linear layer. Saved for backward: X, XA (M, r), and Z (M, N) for the magnitude's gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.autograd.call import (
    again,
    bias_of,
    composed,
    derived,
    direct_apply,
    fold_scaling,
    in_shape,
    is_compiling,
    kind_of,
    number_scaling,
    vjp,
)
from lora_kernels.autograd.lora_linear import _check, _rows, dropout_seed
from lora_kernels.errors import ConfigError, ShapeError
from lora_kernels.ops import dora_linear as ops
from lora_kernels.ops.weight_norm import NormCache, weight_norm
from lora_kernels.planning.choose import resolve_backend
from lora_kernels.reference import composition
from lora_kernels.reference.dora_linear import DoRANeeds

__all__ = ["NormCache", "dora_linear", "weight_norm"]

Call = tuple[float, float, str, bool]  # scaling, p, backend, keep_z: whether Z is saved for the backward


class _DoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        X: Tensor,
        W: Tensor,
        A: Tensor,
        B: Tensor,
        m: Tensor,
        bias: Tensor | None,
        norm: Tensor,
        seed: Tensor | None,
        call: Call,
    ) -> Tensor:
        X2 = _rows(X)
        scaling, p, backend, keep_z = call
        Y, XA, Z, keep = ops.dora_linear_fwd(X2, W, A, B, m, norm, bias, scaling, p, seed, backend, keep_z)
        has_bits = seed is not None and backend != "reference"
        ctx.save_for_backward(X, W, A, B, m, norm, XA, Z if keep_z else None, seed, keep if has_bits else None)
        ctx.call = call
        return Y if X.dim() == 2 else in_shape(Y, *X.shape[:-1], Y.shape[-1])

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        X, W, A, B, m, norm, XA, Z, seed, keep = ctx.saved_tensors
        scaling, p, backend, _ = ctx.call
        need_x, _, *need = ctx.needs_input_grad[:6]
        needs = DoRANeeds(need_x, *need)
        if again(dY):
            mask = composition.keep_mask(X, X.shape[-1], p, seed, backend != "reference")
            dX, *rest = vjp(
                lambda X, A, B, m, bias: composition.dora_linear(X, W, A, B, m, norm, bias, scaling, mask, p),
                (X, A, B, m, bias_of(needs.bias, X, W.shape[0])),
                needs,
                dY,
            )
            return dX, None, *rest, None, None, None
        grads = ops.dora_linear_bwd(
            _rows(dY), _rows(X), W, A, B, m, norm, XA, Z, scaling, p, seed, keep, needs, backend
        )
        dX, dA, dB, dm, dbias = grads
        if dX is not None and X.dim() != 2:
            dX = dX.view(X.shape)
        return dX, None, dA, dB, dm, dbias, None, None, None


_apply = direct_apply(_DoRALinear)


def dora_linear(
    X: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    m: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    backend: str = "auto",
    norms: NormCache | None = None,
    trust: bool = False,
) -> Tensor:
    """Y = g * (X W^T + scaling * X A^T B^T) + bias with g = m / ||W + scaling * B A||, row by row, as PEFT's DoRA.

    No gradient passes through the norm. Dropout acts on the adapter's input and on the part of the base that the
    magnitude rescales: Y = X W^T + bias + (g-1) * D(X) W^T + g * scaling * D(X) A^T B^T.

    Args:
        X: (..., K), float64 (reference only), float32, float16 or bfloat16; any strides, any number of rows.
        W: (N, K) frozen, in X's dtype.
        A, B: (r, K) and (N, r), any float dtype; rounded to X's dtype (to float32 if that is float16) where they
            multiply X, and not rounded for the norm.
        m: (N,) the magnitude, any float dtype.
        bias: (N,) in X's dtype, or None.
        scaling, dropout_p, training, seed, backend: as in lora_linear.
        norms: a cache of this adapter's norms, passed at every call; None computes them.
        trust: as in NormCache.norm.

    Returns:
        Y (..., N) in X's dtype (under torch.autocast in its dtype). Gradients flow to X, A, B, m, and to bias if it
        requires one, to any order.

    Raises:
        FrozenWeightError, ShapeError, BackendUnavailableError, ConfigError: as lora_linear.

    Source: Liu et al., DoRA, arXiv 2402.09353.
    """
    if not 0.0 <= dropout_p <= 1.0:
        raise ConfigError(f"dropout_p={dropout_p}; accepted is a probability from 0 to 1")
    if type(scaling) is not float:
        A, scaling = number_scaling(A, scaling)
    stored, device_type = W, kind_of(X)
    if torch.is_autocast_enabled(device_type) and X.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        X, W = X.to(dtype), W.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(X, W, A, B, bias)
    if m.shape != (W.shape[0],) or not m.dtype.is_floating_point or m.device != X.device:
        raise ShapeError(
            f"m is {m.dtype} {tuple(m.shape)} on {m.device}; expected floating-point ({W.shape[0]},) on {X.device}"
        )
    backend = resolve_backend(backend, device_type, X.dtype)
    state = dropout_seed(seed, X.device) if training and dropout_p > 0.0 else None
    apply, composes = _apply, derived()
    if not composes and is_compiling():
        A, scaling = fold_scaling(A, scaling)
        apply = _DoRALinear.apply
    norm = weight_norm(stored, A, B, scaling) if norms is None else norms.norm(stored, A, B, scaling, trust)
    if composes:
        keep = composition.keep_mask(X, X.shape[-1], dropout_p, state, backend != "reference")
        return composed(composition.dora_linear, X, W, A, B, m, norm, bias, scaling, keep, dropout_p)
    if torch.is_grad_enabled():
        return apply(X, W, A, B, m, bias, norm, state, (scaling, dropout_p, backend, m.requires_grad))
    Y = ops.dora_linear_fwd(_rows(X), W, A, B, m, norm, bias, scaling, dropout_p, state, backend, False)[0]
    return Y if X.dim() == 2 else Y.view(*X.shape[:-1], Y.shape[-1])
