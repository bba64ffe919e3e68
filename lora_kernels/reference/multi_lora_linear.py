"""Many adapters over one linear layer, one adapter for each row of X, forward and backward.

    l = ids[m], the slot of row m with rank r_l and scaling s_l; none for ids[m] < 0, ids[m] >= L or r_l = 0
    XA[m, :r_l] = s_l X[m] A_l^T             (M, max_rank)   saved; zero elsewhere
    Y[m]        = X[m] W^T + bias + XA[m, :r_l] B_l^T        (M, N)
    dYB[m]      = s_l dY[m] B_l              (M, r_l)
    dX[m]       = dY[m] W + dYB[m] A_l       (M, K)
    dA_l        = sum over rows of l: dYB[m]^T X[m]          (r_l, K)
    dB_l        = sum over rows of l: dY[m]^T XA[m, :r_l]    (N, r_l)
    dbias       = sum over the rows of dY    (N,)

XA and dYB are in low_rank_dtype(X.dtype), to which A and B are converted: float32 for float16, else X's own.
The rows of a slot are brought together on the host, one set of small products a slot. Source: Chen et al., Punica,
arXiv 2310.18547, section 4, for the problem; the products are those of reference/lora_linear.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from lora_kernels.operands.dtypes import low_rank_dtype
from lora_kernels.operands.slots import Slots
from lora_kernels.reference.lora_linear import GradMask, _as
from lora_kernels.reference.multi_infer import owned, places, rows_of
from lora_kernels.reference.products import add_low_rank_, linear, mm, scaled_mm


class Part(NamedTuple):
    """The rows of one slot: a slice if they are adjacent, else their indices; and the slot's position and scaling."""

    rows: slice | Tensor
    first: int
    r: int
    scaling: float


def parts(slots: Slots, ids: Tensor) -> Iterator[Part]:
    """The slots that rows ``ids`` (M,) use, in order; without ids that are not slots, and without empty slots."""
    batch = rows_of(ids)
    for begin, end, first, r, scaling in owned(batch.in_order, places(slots)):
        rows = batch.order[begin:end]
        low, high = int(rows[0]), int(rows[-1])
        yield Part(slice(low, high + 1) if high - low + 1 == end - begin else rows, first, r, scaling)


def _add_mm(Y: Tensor, rows: slice | Tensor, P: Tensor, Q: Tensor) -> None:
    """Y[rows] += P Q in place."""
    if isinstance(rows, slice):
        add_low_rank_(Y[rows], P, Q)
    else:
        Y.index_copy_(0, rows, add_low_rank_(Y.index_select(0, rows), P, Q))


def multi_lora_linear_fwd(
    X: Tensor, W: Tensor, slots: Slots, ids: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Y (M, N) and XA (M, max_rank) for X (M, K), W (N, K), ids (M,), bias (N,).

    Where nothing is kept for a backward, multi_infer.py has faster orders.
    """
    Y = linear(X, W, bias)
    XA = X.new_zeros(X.shape[0], slots.max_rank, dtype=low_rank_dtype(X.dtype))
    for rows, first, r, scaling in parts(slots, ids):
        xa = scaled_mm(X[rows], _as(slots.A[first : first + r], XA).t(), scaling)
        XA[rows, :r] = xa
        _add_mm(Y, rows, xa, _as(slots.B[:, first : first + r], XA).t())
    return Y, XA


def multi_lora_linear_bwd(
    dY: Tensor,
    X: Tensor,
    W: Tensor,
    slots: Slots,
    ids: Tensor,
    XA: Tensor,
    needs: GradMask = GradMask(),  # noqa: B008  (immutable)
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dX (M, K), dA (R, K) in A's dtype, dB (N, R) in B's, dbias (N,); None for each that ``needs`` excludes.

    dA and dB are zero where no row of the batch belongs.
    """
    A, B = slots.A, slots.B
    dX = mm(dY, W) if needs.X else None
    dA = A.new_zeros(A.shape) if needs.A else None
    dB = B.new_zeros(B.shape) if needs.B else None
    if dX is not None or dA is not None or dB is not None:
        for rows, first, r, scaling in parts(slots, ids):
            own = slice(first, first + r)
            dy = dY[rows]
            if dX is not None or dA is not None:
                dyb = scaled_mm(dy, _as(B[:, own], XA), scaling)
                if dX is not None:
                    _add_mm(dX, rows, dyb, _as(A[own], XA))
                if dA is not None:
                    dA[own] = _as(mm(dyb.t(), X[rows]), A)
            if dB is not None:
                dB[:, own] = _as(mm(dy.t(), XA[rows, :r]), B)
    return dX, dA, dB, dY.sum(0) if needs.bias else None
