"""What the linear layer with many adapters costs: the launches of each plan, their FLOP and bytes.

Which adapters a batch holds is data of the device, so a plan is judged for a batch that the host can know of: every
slot in use once where there are rows enough, slots of the mean rank, rows of one slot side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lora_kernels.planning.cost import Launch, library


@dataclass(frozen=True)
class MultiCallShape:
    """One call: direction, M rows, N, K, L slots of R ranks in all, dtype, and whether XA is to be kept.

    ``need_dx``: backward, whether X asks for a gradient.
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
        """Adapters that a batch is taken to hold."""
        return min(self.L, self.M)

    @property
    def ranks(self) -> int:
        """Their ranks in all."""
        return -(-self.R * self.distinct // max(self.L, 1))

    @property
    def rank(self) -> int:
        """The mean rank, which a row has."""
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
    """Everything in one launch: W, and the A and B of the adapters that are there, once."""
    moved = q.N * q.K + q.ranks * (q.N + q.K) + q.M * (q.N + q.K)
    return Launch("multi_decode", 2 * q.M * (q.N * q.K + q.rank * (q.N + q.K)), q.dtype.itemsize * moved, maker)


def rows(q: MultiCallShape) -> Launch:
    """The rows of every slot from M ids, read twice a slot: from memory once."""
    return Launch("multi_rows", 0, 4 * (2 * q.M + 2 * q.L))


def gradients(q: MultiCallShape) -> Launch:
    """dA_l = dYB^T X and dB_l = dY^T XA: one walk over each matrix, one launch for both."""
    low = q.M * q.rank
    moved = q.M * (q.K + q.N) + 2 * low + q.R * (q.K + q.N)
    return Launch("multi_grads", 2 * low * (q.K + q.N), q.dtype.itemsize * moved)


def sums(q: MultiCallShape, spans: int = 4) -> Launch:
    """dA_l and dB_l from float32 partials of ``spans`` spans of rows; none is launched for one span."""
    return Launch("multi_sum", 0, (4 * spans + q.dtype.itemsize) * q.R * (q.K + q.N))


def launches(name: str, q: MultiCallShape) -> tuple[Launch, ...]:
    """The launches of plan ``name``, in order; the sum of partials, as long in every plan, is left out."""
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


# The kernels by the names of their launches, and what each does to a forward CallShape; N and K change places for dX.
KERNELS: dict[str, Callable[[MultiCallShape], Launch]] = {
    "multi_shrink": lambda q: shrink(q, q.K),
    "multi_extend": lambda q: extend(q, q.N, q.K),
    "multi_expand": lambda q: expand(q, q.N),
    "multi_decode": decode,
    "multi_rows": rows,
    "multi_grads": gradients,
    "multi_sum": sums,
}
