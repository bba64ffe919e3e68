"""LoRA on one linear layer, forward and backward.

    XA  = s/(1-p) (D*X) A^T                 (M, r)   saved
    Y   = X W^T + bias + XA B^T             (M, N)
    dYB = s dY B                            (M, r)
    dX  = dY W + D/(1-p) * (dYB A)          (M, K)
    dA  = dYB^T (D*X) / (1-p)               (r, K)
    dB  = dY^T XA                           (N, r)
    dbias = sum over the rows of dY         (N,)

D is the 0/1 keep mask of inverted dropout on the adapter's input, s the scaling. s is applied only to XA and dYB,
before they are rounded, so it adds no rounding; no other term needs it.
XA and dYB are in low_rank_dtype(X.dtype), to which A and B are converted: float32 for float16, else X's own.
Source: Hu et al., LoRA, arXiv 2106.09685, equation 3.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lora_kernels.operands.dtypes import low_rank_dtype
from lora_kernels.reference.products import add_low_rank_, linear, mm, scaled_mm, wide_mm


class GradMask(NamedTuple):
    """The gradients that a backward call computes."""

    X: bool = True
    A: bool = True
    B: bool = True
    bias: bool = False


def _inv_keep(keep: Tensor | None, p: float) -> float:
    """1/(1-p), the factor of inverted dropout; 1 without dropout."""
    if keep is None:
        return 1.0
    return 0.0 if p >= 1.0 else 1.0 / (1.0 - p)


def _as(T: Tensor, X: Tensor) -> Tensor:
    """T in X's dtype; T itself if it has that dtype (a ``to`` without effect takes microseconds)."""
    return T if T.dtype == X.dtype else T.to(X.dtype)


def lora_linear_fwd(
    X: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    scaling: float,
    keep: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Y (M, N) and XA (M, r) for X (M, K), W (N, K), A (r, K), B (N, r), bias (N,) and keep (M, K) or None.

    A and B may have another float dtype than X: they are rounded to low_rank_dtype(X.dtype), the dtype of XA.
    """
    dtype, XD = low_rank_dtype(X.dtype), X
    A = A if A.dtype is dtype else A.to(dtype)
    B = B if B.dtype is dtype else B.to(dtype)
    if keep is not None:  # a product with bool takes three times as long on a CPU
        XD, scaling = X * _as(keep, X), scaling * _inv_keep(keep, p)
    XA = scaled_mm(XD, A.t(), scaling)
    return add_low_rank_(linear(X, W, bias), XA, B.t()), XA


def lora_linear_bwd(
    dY: Tensor,
    X: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    XA: Tensor,
    scaling: float,
    keep: Tensor | None = None,
    p: float = 0.0,
    needs: GradMask = GradMask(),  # noqa: B008  (immutable)
    dZ: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dX (M, K), dA (r, K) in A's dtype, dB (N, r) in B's, dbias (N,); None for each that ``needs`` excludes.

    ``dZ`` (M, N): the gradient of the base product X W^T if it differs from dY (in DoRA); None for dY.
    """
    # dA before dX, whose update then finds it in the cache, and dB after: on a CPU 2 to 8 % less than dX first
    dX = dA = dB = dbias = None
    D = None if keep is None else _as(keep, X)
    if needs.X or needs.A:
        dYB = scaled_mm(dY, _as(B, XA), scaling, XA)
        if needs.A:
            XD = X if D is None else X * D
            dA = _as(scaled_mm(dYB.t(), XD, _inv_keep(keep, p), A), A)
            del XD
        if needs.X:
            dX = mm(dY if dZ is None else dZ, W)
            if D is None:
                add_low_rank_(dX, dYB, _as(A, XA))
            else:
                dX.addcmul_(wide_mm(dYB, _as(A, XA)), D, value=_inv_keep(keep, p))
    if needs.B:
        dB = _as(mm(dY.t(), XA), B)
    if needs.bias:
        dbias = dY.sum(0)
    return dX, dA, dB, dbias
