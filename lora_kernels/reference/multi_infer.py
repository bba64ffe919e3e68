"""The forward of many adapters over one linear layer without a backward, computed in one of four orders.

    Y[m] = X[m] W^T + bias + s_l X[m] A_l^T B_l^T        l = ids[m]        X (M, K)  W (N, K)  Y (M, N)

runs      adjacent rows with one adapter are a slice of X and of Y: no row is copied
masked    X times every adapter in use, ranks of other rows' adapters set to zero, one product into Y; uses groups if a
          B is not finite, since zero times such a B is NaN in every row
sorted    rows sorted by adapter before the base product, slices of it, and rows put back in order
groups    each adapter's rows gathered, its product added to those rows of Y

X A^T is in low_rank_dtype(X.dtype), to which A and B are converted: float32 for float16, else X's own.
Which is fastest on a CPU depends on the number of rows, on the dtype and on the CPU: 16-bit products of few rows cost
20 to 50 us each at any size, so there one large product is faster. docs/multi_lora_linear.md has the measurements.
"""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.operands.dtypes import low_rank_dtype
from lora_kernels.operands.slots import Slots
from lora_kernels.reference.products import add_low_rank_, linear, wide_mm

RUN_ROWS = 64  # mean run length from which slices are faster than gathered rows
SORTED_ROWS = 512  # up to which copying whole rows of X and Y costs less than adding to scattered ones
MASKED_ROWS = 256  # up to which one product for all adapters costs less than one each, where 16 bits come in tiles
KEPT_SCALES = 8  # number of different adapter positions among a model's layers to cache
MASKED_PRODUCTS = 4_000_000  # M r (K + N) that take as long as one adapter's two products take to start, in 16 bit


class Run(NamedTuple):
    """Rows begin .. end with one adapter: its position in A and B, its rank and its scaling."""

    begin: int
    end: int
    first: int
    r: int
    scaling: float


class Rows:
    """Rows of a batch by its ids (M,), computed on first use: runs of equal adjacent ids, and the sorted rows."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids
        self._index: dict[int, Tensor] = {}
        self._scales: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    @functools.cached_property
    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest id."""
        low, high = self.ids.aminmax()
        return int(low), int(high)

    @functools.cached_property
    def runs(self) -> int:
        """Number of runs of equal adjacent ids."""
        return int((self.ids[1:] != self.ids[:-1]).sum()) + 1 if self.ids.numel() else 0

    @functools.cached_property
    def in_place(self) -> list[tuple[int, int, int]]:
        """(slot, begin, end) of each run."""
        return _runs(self.ids)

    @functools.cached_property
    def order(self) -> Tensor:
        """The rows sorted by slot (stable)."""
        return self.ids.argsort(stable=True)

    @functools.cached_property
    def back(self) -> Tensor:
        """The position of each row in ``order``."""
        back = torch.empty_like(self.order)
        back[self.order] = torch.arange(back.shape[0], device=back.device)
        return back

    @functools.cached_property
    def in_order(self) -> list[tuple[int, int, int]]:
        """(slot, begin, end) of each slot in the sorted rows."""
        return _runs(self.ids[self.order])

    def index(self, L: int) -> Tensor:
        """The slot of each row, L for none."""
        if L not in self._index:
            self._index[L] = torch.where((self.ids < 0) | (self.ids >= L), L, self.ids)
        return self._index[L]

    def scales(
        self, L: int, there: tuple[tuple[int, int, float, int], ...], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Two tensors (M, ranks) for the adapters ``there`` (first, rank, scaling, slot) side by side: the scaling of
        the row's own adapter in its columns; and whether a column belongs to another adapter. Cached, since the layers
        of a model have the same adapters at the same places."""
        key = L, there, dtype
        kept = self._scales.get(key)
        if kept is None:
            ends = list(itertools.accumulate(r for _, r, _, _ in there))
            table = torch.zeros(L + 1, ends[-1], dtype=dtype, device=self.ids.device)
            others = torch.ones_like(table, dtype=torch.bool)
            for end, (_, r, scaling, slot) in zip(ends, there, strict=True):
                table[slot].narrow(0, end - r, r).fill_(scaling)
                others[slot].narrow(0, end - r, r).fill_(False)
            index = self.index(L)
            if len(self._scales) >= KEPT_SCALES:
                self._scales.clear()
            kept = self._scales[key] = table.index_select(0, index), others.index_select(0, index)
        return kept


def _runs(ids: Tensor) -> list[tuple[int, int, int]]:
    present, counts = torch.unique_consecutive(ids, return_counts=True)
    ends = list(itertools.accumulate(counts.tolist()))
    return list(zip(present.tolist(), [0, *ends], ends, strict=False))


_last: tuple[weakref.ref[Tensor], int, Rows] | None = None


def rows_of(ids: Tensor) -> Rows:
    """The Rows of ``ids``, cached for the last tensor until it is written to: every layer uses it."""
    global _last
    if ids.is_inference():  # such a tensor has no version counter
        return Rows(ids)
    last = _last  # read once: another thread may replace it at any time
    if last is not None and last[0]() is ids and last[1] == ids._version:
        return last[2]
    rows = Rows(ids.detach())  # no cycle: a view keeps the memory, not the tensor that was given
    _last = weakref.ref(ids), ids._version, rows
    return rows


def places(slots: Slots) -> list[tuple[int, int, float]]:
    """(first, rank, scaling) of each slot; a rank of 0 if it is empty or exceeds the buffers."""
    starts, ranks, scalings = slots.starts.tolist(), slots.ranks.tolist(), slots.scalings.tolist()
    R = slots.A.shape[0]
    return [
        (first, max(0, min(r, slots.max_rank, R - first)) if first >= 0 else 0, scaling)
        for first, r, scaling in zip(starts, ranks, scalings, strict=True)
    ]


def owned(runs: list[tuple[int, int, int]], held: list[tuple[int, int, float]]) -> list[Run]:
    """The runs that have an adapter, each with its position."""
    return [Run(begin, end, *held[slot]) for slot, begin, end in runs if 0 <= slot < len(held) and held[slot][1]]


@functools.cache
def tiles_of_16_bit() -> bool:
    """Whether this CPU multiplies whole tiles of bfloat16 (AMX): then a product costs little and its start much."""
    capabilities: Callable[[], Mapping[str, object]] = getattr(torch.cpu, "get_capabilities", dict)
    return bool(capabilities().get("amx_bf16"))


def order_for(M: int, N: int, K: int, dtype: torch.dtype, rows: Rows, runs: list[Run]) -> str:
    """The order that is fastest for M rows of which ``runs`` sorted ones have adapters."""
    half = dtype.itemsize == 2
    tiles, ranks = half and tiles_of_16_bit(), sum(run.r for run in runs)
    if half and (
        M * ranks * (K + N) <= MASKED_PRODUCTS * len(runs)
        or (tiles and (M <= MASKED_ROWS or ranks * (K + N) <= 2 * N * K))
    ):
        return "masked"
    if rows.runs <= len(rows.in_order) + 1 or (not tiles and rows.runs * RUN_ROWS <= M):
        return "runs"
    return "sorted" if tiles or (not half and M <= SORTED_ROWS) else "groups"


def multi_lora_linear_infer(X: Tensor, W: Tensor, slots: Slots, ids: Tensor, bias: Tensor | None) -> Tensor:
    """Y (M, N) for X (M, K), W (N, K), ids (M,), bias (N,) or None; A and B are rounded to X's dtype."""
    rows, held = rows_of(ids), places(slots)
    if rows.runs <= 1:
        return _add_runs(linear(X, W, bias), X, slots, owned(rows.in_place, held))
    runs = owned(rows.in_order, held)
    if not runs:
        return linear(X, W, bias)
    N, K = W.shape
    order = order_for(X.shape[0], N, K, X.dtype, rows, runs)
    if order == "runs":
        return _add_runs(linear(X, W, bias), X, slots, owned(rows.in_place, held))
    if order == "sorted":
        X = X.index_select(0, rows.order)
        return _add_runs(linear(X, W, bias), X, slots, runs).index_select(0, rows.back)
    Y = linear(X, W, bias)
    if order == "masked":
        if (whole := _masked(Y, X, slots, held, rows)) is not None:
            return whole
        Y = linear(X, W, bias)
    for begin, end, first, r, scaling in runs:
        own = rows.order[begin:end]
        A, Bt = _factors(slots.A.narrow(0, first, r), slots.B.narrow(1, first, r).t(), X)
        if A.dtype is X.dtype:
            Y.index_add_(0, own, X.index_select(0, own) @ A.t() @ Bt, alpha=scaling)
        else:
            xa = wide_mm(X.index_select(0, own), A.t(), scaling)
            Y.index_copy_(0, own, add_low_rank_(Y.index_select(0, own), xa, Bt))
    return Y


def _factors(A: Tensor, Bt: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """A and B^T in the dtype of X A^T; themselves if they have it (a ``to`` without effect takes microseconds)."""
    dtype = low_rank_dtype(X.dtype)
    return (A if A.dtype is dtype else A.to(dtype)), (Bt if Bt.dtype is dtype else Bt.to(dtype))


def _add_runs(Y: Tensor, X: Tensor, slots: Slots, runs: list[Run]) -> Tensor:
    """Y[run] += s X[run] A^T B^T in place."""
    At, Bt = slots.A.t(), slots.B.t()
    for begin, end, first, r, scaling in runs:  # narrow, twice as fast as a slice: with few rows the host decides
        a, bt = _factors(At.narrow(1, first, r), Bt.narrow(0, first, r), X)
        x, y = X.narrow(0, begin, end - begin), Y.narrow(0, begin, end - begin)
        if a.dtype is X.dtype:
            y.addmm_(x @ a, bt, alpha=scaling)
        else:
            add_low_rank_(y, wide_mm(x, a, scaling), bt)
    return Y


def _masked(Y: Tensor, X: Tensor, slots: Slots, held: list[tuple[int, int, float]], rows: Rows) -> Tensor | None:
    """Y += (X A^T, masked to the ranks of each row's own adapter) B^T in place, for all adapters side by side.

    None if a B is not finite. Every row multiplies every B, so then the first row of Y is not finite.
    """
    L = len(held)
    there = tuple(sorted((*held[slot], slot) for slot, _, _ in rows.in_order if 0 <= slot < L and held[slot][1]))
    A, Bt = slots.A, slots.B.t()
    ends = list(itertools.accumulate(r for _, r, _, _ in there))
    if ends[-1] != A.shape[0] or [first for first, *_ in there] != [0, *ends[:-1]]:
        A = torch.cat([A.narrow(0, first, r) for first, r, _, _ in there])
        if Bt.stride(1) == 1:
            Bt = torch.cat([Bt.narrow(0, first, r) for first, r, _, _ in there])
        else:
            Bt = torch.cat([slots.B.narrow(1, first, r) for first, r, _, _ in there], 1).t()
    A, Bt = _factors(A, Bt, X)
    own, others = rows.scales(L, there, torch.promote_types(X.dtype, torch.float32))  # 16 bit would round s
    XA = X @ A.t() if A.dtype is X.dtype else wide_mm(X, A.t())
    XA.mul_(own).masked_fill_(others, 0)  # another adapter's XA may be inf or NaN
    Y = add_low_rank_(Y, XA, Bt)
    return Y if math.isfinite(Y[0].sum(dtype=torch.float32)) else None
