"""LoRA on P linear layers of one input (q, k, v; gate, up), forward and backward.

    XA   = [s_0/(1-p) (D*X) A_0^T, s_1/(1-p) (D*X) A_1^T, ...]      (M, R), R = sum of r_p   saved
    Y_p  = X W_p^T + bias_p + XA_p B_p^T                            (M, N_p)
    dYB  = [s_0 dY_0 B_0, s_1 dY_1 B_1, ...]                        (M, R)
    dX   = sum over p of dY_p W_p + D/(1-p) * (dYB A)               (M, K)
    dA   = dYB^T (D*X) / (1-p)                                      (R, K)
    dB_p = dY_p^T XA_p                                              (N_p, r_p)
    dbias_p = sum over the rows of dY_p                             (N_p,)

A is [A_0; A_1; ...] (R, K), and XA_p the r_p columns of XA that belong to projection p. D is one keep mask for all.
Source: Hu et al., LoRA, arXiv 2106.09685, equation 3; the stacking is exact, term by term.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.operands.dtypes import low_rank_dtype
from lora_kernels.reference.lora_linear import _as, _inv_keep
from lora_kernels.reference.products import add_low_rank_, add_mm_, linear, mm, scaled_mm, wide_mm


class StackedNeeds(NamedTuple):
    """The gradients that a backward call computes: of X, of A (all projections at once), of each B_p and bias_p."""

    X: bool
    A: bool
    B: Sequence[bool]
    bias: Sequence[bool]


def columns(T: Tensor, ranks: Sequence[int]) -> tuple[Tensor, ...]:
    """The columns of T (M, R) that belong to each projection: views (M, r_p). (``split`` takes three times as long.)"""
    return T.split_with_sizes(list(ranks), dim=1)


def _down(
    P: Sequence[Tensor], Q: Sequence[Tensor], factors: Sequence[float], shared: Tensor | None = None
) -> tuple[Tensor, list[int]]:
    """[f_0 P_0 Q_0, f_1 P_1 Q_1, ...] side by side, each scaled before it is rounded; and the widths of the blocks.

    The result has the dtype of the Q_i, which is that of the P_i or wider.
    """
    widths = [q.shape[1] for q in Q]
    if shared is not None and len(set(factors)) == 1:  # one product over the stacked Q
        return scaled_mm(shared, Q[0] if len(Q) == 1 else torch.cat(list(Q), 1), factors[0]), widths
    out = P[0].new_empty(P[0].shape[0], sum(widths), dtype=Q[0].dtype)
    for part, p, q, factor in zip(columns(out, widths), P, Q, factors, strict=True):
        torch.addmm(part, _as(p, q), q, beta=0, alpha=factor, out=part)
    return out, widths


def lora_linear_stacked_fwd(
    X: Tensor,
    W: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    scaling: Sequence[float],
    keep: Tensor | None = None,
    p: float = 0.0,
) -> tuple[list[Tensor], Tensor]:
    """Y_p (M, N_p) each and XA (M, R) for X (M, K), W_p (N_p, K), A_p (r_p, K), B_p (N_p, r_p), keep (M, K) or None."""
    XD = X if keep is None else X * _as(keep, X)
    dtype = low_rank_dtype(X.dtype)
    down = [(a if a.dtype is dtype else a.to(dtype)).t() for a in A]
    XA, ranks = _down([XD] * len(A), down, [s * _inv_keep(keep, p) for s in scaling], shared=XD)
    Y = []
    for w, b, up, xa in zip(W, bias, B, columns(XA, ranks), strict=True):
        Y.append(add_low_rank_(linear(X, w, b), xa, _as(up, xa).t()))
    return Y, XA


def lora_linear_stacked_bwd(
    dY: Sequence[Tensor],
    X: Tensor,
    W: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    XA: Sequence[Tensor],
    scaling: Sequence[float],
    keep: Tensor | None,
    p: float,
    needs: StackedNeeds,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """dX (M, K), dA (R, K) in A's dtype, the dB_p in B's, the dbias_p; None for each that ``needs`` excludes.

    XA is given as its blocks (M, r_p), so that every list can omit projections without a gradient.
    """
    dX = dA = None
    D = None if keep is None else _as(keep, X)
    if needs.X or needs.A:
        dYB, _ = _down(dY, [_as(b, xa) for b, xa in zip(B, XA, strict=True)], scaling)
        if needs.X:
            A_all = _as(A[0] if len(A) == 1 else torch.cat(list(A)), dYB)
            dX = mm(dY[0], W[0])
            for dy, w in zip(dY[1:], W[1:], strict=True):
                add_mm_(dX, dy, w)
            if D is None:
                add_low_rank_(dX, dYB, A_all)
            else:
                dX.addcmul_(wide_mm(dYB, A_all), D, value=_inv_keep(keep, p))
        if needs.A:
            XD = X if D is None else X * D
            dA = _as(scaled_mm(dYB.t(), XD, _inv_keep(keep, p)), A[0])
    dB = [_as(mm(dy.t(), xa), b) if need else None for dy, xa, b, need in zip(dY, XA, B, needs.B, strict=True)]
    dbias = [dy.sum(0) if need else None for dy, need in zip(dY, needs.bias, strict=True)]
    return dX, dA, dB, dbias
