"""Cost model of the linear layer with many adapters: the launches of each plan, their FLOP and bytes.

Adapter ids are stored on the GPU, so the model assumes a uniform batch: every slot is used if there are enough rows,
each slot has the mean rank, and the rows of one slot are adjacent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lora_kernels.planning.cost import Launch, library


@dataclass(frozen=True)
class MultiCallShape:
    """One call: direction, M rows, N, K, L slots of R ranks in all, dtype, and whether XA is kept.

    ``need_dx``: in a backward, whether X requires a gradient.
    """

    op: str  # "fwd" or "bwd"
    M: int
    N: int
    K: int
    L: int
    R: int
    dtype: torch.dtype
    need_xa: bool = False
    need_dx: bool = True

    @property
    def distinct(self) -> int:
        """Number of adapters that the batch is assumed to use."""
        return min(self.L, self.M)

    @property
    def ranks(self) -> int:
        """Sum of their ranks."""
        return -(-self.R * self.distinct // max(self.L, 1))

    @property
    def rank(self) -> int:
        """The mean rank, assumed for every row."""
        return -(-self.R // max(self.L, 1))


def shrink(q: MultiCallShape, width: int, kernel: str = "multi_shrink") -> Launch:
    """XA = s X A_l^T over the rows of X (M, width)."""
    moved = q.M * width + q.ranks * width + q.M * q.rank
    return Launch(kernel, 2 * q.M * q.rank * width, q.dtype.itemsize * moved)


def extend(q: MultiCallShape, N: int, K: int) -> Launch:
    """Y (M, N) = X W^T + XA B_l^T, or dX by the same kernel."""
    moved = q.M * K + N * K + q.M * N + q.ranks * N + q.M * q.rank
    return Launch("multi_extend", 2 * q.M * N * (K + q.rank), q.dtype.itemsize * moved)


def expand(q: MultiCallShape, N: int) -> Launch:
    """Y += XA B_l^T in place."""
    return Launch("multi_expand", 2 * q.M * N * q.rank, q.dtype.itemsize * (2 * q.M * N + q.ranks * N + q.M * q.rank))


def decode(q: MultiCallShape, maker: str = "pointer") -> Launch:
    """The whole forward in one launch: reads W and the A and B of the adapters in use once."""
    moved = q.N * q.K + q.ranks * (q.N + q.K) + q.M * (q.N + q.K)
    return Launch("multi_decode", 2 * q.M * (q.N * q.K + q.rank * (q.N + q.K)), q.dtype.itemsize * moved, maker)


def rows(q: MultiCallShape) -> Launch:
    """The list of rows of each slot, from M ids. Every slot reads the ids twice; one read is counted as from memory."""
    return Launch("multi_rows", 0, 4 * (2 * q.M + 2 * q.L))


def gradients(q: MultiCallShape) -> Launch:
    """dA_l = dYB^T X and dB_l = dY^T XA: one pass over each matrix, one launch for both."""
    low = q.M * q.rank
    moved = q.M * (q.K + q.N) + 2 * low + q.R * (q.K + q.N)
    return Launch("multi_grads", 2 * low * (q.K + q.N), q.dtype.itemsize * moved)


def sums(q: MultiCallShape, spans: int = 4) -> Launch:
    """dA_l and dB_l from float32 partials of ``spans`` spans of rows; one span needs no such launch."""
    return Launch("multi_sum", 0, (4 * spans + q.dtype.itemsize) * q.R * (q.K + q.N))


def launches(name: str, q: MultiCallShape) -> tuple[Launch, ...]:
    """The launches of plan ``name``, in order, without the sum of partials, which is equal in every plan."""
    e = q.dtype.itemsize
    if q.op == "bwd":
        dX: tuple[Launch, ...] = ()
        if q.need_dx:
            base = library("matmul", q.M, q.K, q.N, e)
            dX = (base, expand(q, q.K)) if name == "eager" else (extend(q, q.K, q.N),)
        return shrink(q, q.N), *dX, rows(q), gradients(q)
    if name in ("decode", "cuda"):
        return (decode(q),)
    if name == "extend":
        return shrink(q, q.K), extend(q, q.N, q.K)
    return shrink(q, q.K), library("matmul", q.M, q.N, q.K, e), expand(q, q.N)


# The kernels: launch name -> cost of a forward MultiCallShape; for dX, N and K are exchanged.
KERNELS: dict[str, Callable[[MultiCallShape], Launch]] = {
    "multi_shrink": lambda q: shrink(q, q.K),
    "multi_extend": lambda q: extend(q, q.N, q.K),
    "multi_expand": lambda q: expand(q, q.N),
    "multi_decode": decode,
    "multi_rows": rows,
    "multi_grads": gradients,
    "multi_sum": sums,
}
