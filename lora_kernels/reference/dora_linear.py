"""DoRA on one linear layer, forward and backward: the columns of LoRA's output rescaled by g = m / norm.

    Z   = X W^T + s X A^T B^T               (M, N)   saved
    Y   = g * Z + bias                      (M, N)
    dZ  = g * dY                            dX, dA, dB as LoRA's for dZ
    dm  = sum over the rows of dY * Z / norm

norm (N,) are the row norms of W + s B A; no gradient passes through them (section 4.3 of the paper). While dropout acts
on the adapter's input, with D the 0/1 keep mask, it acts on the part of the base that is rescaled too, as in PEFT:

    XD  = D/(1-p) * X
    P   = XD W^T                            (M, N)   saved
    Y   = X W^T + bias + s XD A^T (g*B)^T + (g-1) * P
    dX, dA, d(gB)  as LoRA's for dY with g*B in B's place;  dB = g * d(gB)
    dX += D/(1-p) * ((g-1) * dY) W
    dm  = (sum over the rows of dY * P + sum over the columns of d(gB) * B) / norm

float16 uses this form also without dropout, with XD = X: g enters through the float32 g*B, since Z and g * dY can leave
float16's range even if Y and the gradients do not. The base part is then Y = g * P + bias, and dX = (g*dY) W.

Source: Liu et al., DoRA, arXiv 2402.09353, equations 5 and 11.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.operands.dtypes import low_rank_dtype
from lora_kernels.reference.lora_linear import GradMask, _as, _inv_keep, lora_linear_bwd, lora_linear_fwd
from lora_kernels.reference.products import add_low_rank_, linear, mm, scaled_mm
from lora_kernels.reference.weight_norm import row_blocks, wide


class DoRANeeds(NamedTuple):
    """The gradients that a backward call computes."""

    X: bool = True
    A: bool = True
    B: bool = True
    m: bool = True
    bias: bool = False


def magnitude_scale(m: Tensor, norm: Tensor) -> Tensor:
    """g (N,) = m / norm in norm's dtype or wider; infinite or NaN if a row of W + s B A is zero, as in PEFT."""
    return m / norm


def scale_columns(Z: Tensor, g: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """g * Z + bias in Z's dtype, rounded once; ``out`` may be Z itself."""
    out = torch.empty_like(Z) if out is None else out
    return torch.mul(Z, g, out=out) if bias is None else torch.addcmul(bias, Z, g, out=out)


def column_dots(P: Tensor, Q: Tensor) -> Tensor:
    """sum over the rows of P * Q, (N,), by blocks that stay in a cache, 16-bit ones in float32."""
    dtype = wide(P)
    total = P.new_zeros(P.shape[1], dtype=dtype)
    M, N = P.shape
    for block in row_blocks(M, N, elements=1 << (16 if P.device.type == "cpu" else 22)):
        total += (P[block].to(dtype) * Q[block]).sum(0)
    return total


def dora_linear_fwd(
    X: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    m: Tensor,
    norm: Tensor,
    bias: Tensor | None,
    scaling: float,
    keep: Tensor | None = None,
    p: float = 0.0,
    keep_z: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Y (M, N), XA (M, r) as LoRA's, and Z (M, N), with dropout P; None unless ``keep_z``.

    X (M, K), W (N, K), A (r, K), B (N, r), m, norm and bias (N,), keep (M, K) or None. A and B are rounded to
    low_rank_dtype(X.dtype), and g is not rounded. In float16 Z is P.
    """
    g = magnitude_scale(m, norm)
    if keep is None and X.dtype is torch.float16:
        dtype = low_rank_dtype(X.dtype)
        XA, Z = scaled_mm(X, A.to(dtype).t(), scaling), linear(X, W, None)
        Y = add_low_rank_(scale_columns(Z, g, bias, None if keep_z else Z), XA, (B * g[:, None]).to(dtype).t())
    elif keep is None:
        Z, XA = lora_linear_fwd(X, W, A, B, None, scaling)
        Y = scale_columns(Z, g, bias, None if keep_z else Z)
    else:
        Y, XA = lora_linear_fwd(X, W, A, B * g[:, None], bias, scaling, keep, p)
        Z = mm(dropped(X, keep, p), W.t())
        Y.addcmul_(Z, g - 1)
    return Y, XA, Z if keep_z else None


def dora_linear_bwd(
    dY: Tensor,
    X: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    m: Tensor,
    norm: Tensor,
    XA: Tensor,
    Z: Tensor | None,
    scaling: float,
    keep: Tensor | None = None,
    p: float = 0.0,
    needs: DoRANeeds = DoRANeeds(),  # noqa: B008  (immutable)
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dX (M, K), dA (r, K), dB (N, r), dm (N,), dbias (N,), each in its operand's dtype; None where not needed."""
    g = magnitude_scale(m, norm)
    dm = None
    if keep is None and X.dtype is not torch.float16:
        if needs.m and Z is not None:
            dm = column_dots(dY, Z).div_(norm).to(m.dtype)
        dbias = dY.sum(0) if needs.bias else None
        linear_needs = GradMask(needs.X, needs.A, needs.B)
        dX, dA, dB, _ = lora_linear_bwd(scale_columns(dY, g), X, W, A, B, XA, scaling, None, 0.0, linear_needs)
        return dX, dA, dB, dm, dbias
    linear_needs = GradMask(needs.X, needs.A, needs.B or needs.m, needs.bias)
    gB = B * g[:, None]
    dZ = scale_columns(dY, g) if keep is None and needs.X else None
    dX, dA, dgB, dbias = lora_linear_bwd(dY, X, W, A, gB, XA, scaling, keep, p, linear_needs, dZ)
    if needs.m and Z is not None and dgB is not None:
        dm = column_dots(dY, Z).add_((dgB * B).sum(1)).div_(norm).to(m.dtype)
    dB = (dgB * g[:, None]).to(B.dtype) if needs.B and dgB is not None else None
    if dX is not None and keep is not None:
        dX.addcmul_(mm(scale_columns(dY, g - 1), W), _as(keep, X), value=_inv_keep(keep, p))
    return dX, dA, dB, dm, dbias


def dropped(X: Tensor, keep: Tensor, p: float) -> Tensor:
    """D/(1-p) * X."""
    return (X * _as(keep, X)).mul_(_inv_keep(keep, p))
