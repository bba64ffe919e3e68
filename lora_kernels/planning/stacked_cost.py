"""Choose the plan of P stacked LoRA linear layers: the launches of each plan, their FLOP and bytes.

cost.py has the costs of kernels that compute one projection; this file has those of the two that compute all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from lora_kernels.kernels.chip import Chip
from lora_kernels.operands.dtypes import low_rank_dtype
from lora_kernels.planning import cost
from lora_kernels.planning.cost import CallShape, Launch, Plan, seconds

PLANS = ("eager", "shrink_extend")


@dataclass(frozen=True)
class StackedCallShape:
    """One call: direction, M rows, K, the N_p and r_p, dtype, and which results are needed.

    ``bits``: the mask is kept as bits. ``adjacent``: the W_p are one tensor. ``one_scaling``: the s_p are equal.
    """

    op: str  # "fwd" or "bwd"
    M: int
    Ns: tuple[int, ...]
    K: int
    ranks: tuple[int, ...]
    dtype: torch.dtype
    dropout: bool = False
    need_dx: bool = True
    bits: bool = True
    adjacent: bool = False
    one_scaling: bool = True

    def one(self, p: int) -> CallShape:
        """The CallShape of projection p alone."""
        return CallShape(
            self.op, self.M, self.Ns[p], self.K, self.ranks[p], self.dtype, self.dropout, False, self.need_dx, self.bits
        )

    @property
    def whole(self) -> CallShape:
        """One layer as wide as all projections, with the sum of their ranks: for the passes over X."""
        return replace(self.one(0), N=sum(self.Ns), r=sum(self.ranks))


def stacked_extend(q: StackedCallShape) -> Launch:
    """Y_p = X W_p^T + XA_p B_p^T for all p."""
    M, K, N, R = q.M, q.K, sum(q.Ns), sum(q.ranks)
    low = sum(n * r for n, r in zip(q.Ns, q.ranks, strict=True))
    moved = M * K + N * K + M * N + M * R + low
    return Launch("stacked_extend", 2 * M * (N * K + low), q.dtype.itemsize * moved)


def stacked_dx(q: StackedCallShape) -> Launch:
    """dX = sum_p dY_p W_p + D*(dYB A), and dA's partials if all ranks fit one tile."""
    return replace(cost.dx_da(q.whole), kernel="stacked_dx")


def _library(kernel: str, M: int, N: int, K: int, q: StackedCallShape, add: bool = False) -> Launch:
    return cost.library(kernel, M, N, K, q.dtype.itemsize, add)


def _eager_fwd(q: StackedCallShape) -> Iterator[Launch]:
    ours = low_rank_dtype(q.dtype) is not q.dtype  # the library does not multiply operands of two dtypes
    by_library = not q.dropout and q.one_scaling and not ours
    yield _library("XA", q.M, sum(q.ranks), q.K, q) if by_library else cost.shrink(q.whole)
    for N in (sum(q.Ns),) if q.adjacent else q.Ns:
        yield _library("matmul", q.M, N, q.K, q)
    for p, (N, r) in enumerate(zip(q.Ns, q.ranks, strict=True)):
        update = replace(q.one(p), K=N, dropout=False)
        yield cost.expand(update) if ours else _library("addmm_", q.M, N, r, q, add=True)


def _eager_bwd(q: StackedCallShape) -> Iterator[Launch]:
    M, K, R = q.M, q.K, sum(q.ranks)
    ours = low_rank_dtype(q.dtype) is not q.dtype
    for p, (N, r) in enumerate(zip(q.Ns, q.ranks, strict=True)):
        if ours:
            yield cost.dyb_db(q.one(p))
            yield cost.reduce(q.one(p))
        else:
            yield _library("dYB", M, r, N, q)
            yield _library("dB", N, r, M, q)
    if q.need_dx:
        for p, N in enumerate(q.Ns):
            yield _library("addmm_" if p else "matmul", M, K, N, q, add=p > 0)
        yield cost.expand(q.whole) if ours or q.dropout else _library("addmm_", M, K, R, q, add=True)
    yield from (cost.da(q.whole), cost.reduce_da(q.whole)) if ours or q.dropout else (_library("dA", R, K, M, q),)


def _stacked_bwd(q: StackedCallShape) -> Iterator[Launch]:
    for p in range(len(q.Ns)):
        yield cost.dyb_db(q.one(p))
        yield cost.reduce(q.one(p))
    if q.need_dx:
        yield stacked_dx(q)
    if not (q.need_dx and cost.makes_da(q.whole)):
        yield cost.da(q.whole)
    yield cost.reduce_da(q.whole)


def launches(name: str, q: StackedCallShape) -> tuple[Launch, ...]:
    """The launches of plan ``name``, one of PLANS, in order, without copies of small matrices."""
    if q.op == "fwd":
        return tuple(_eager_fwd(q)) if name == "eager" else (cost.shrink(q.whole), stacked_extend(q))
    return tuple(_eager_bwd(q) if name == "eager" else _stacked_bwd(q))


@functools.lru_cache(maxsize=4096)
def candidates(problem: StackedCallShape, chip: Chip) -> tuple[Plan, ...]:
    """Every plan for ``problem``, the fastest predicted first."""
    plans = []
    for name in PLANS:
        parts = launches(name, problem)
        plans.append(Plan(name, parts, sum(seconds(part, problem.dtype, chip) for part in parts)))
    return tuple(sorted(plans, key=lambda plan: plan.seconds))


@functools.lru_cache(maxsize=4096)
def choose(problem: StackedCallShape, chip: Chip, forced: str | None = None) -> Plan:
    """The plan that runs: ``forced`` if it is one of PLANS, otherwise (None, or a plan of one layer) its own choice."""
    plans = candidates(problem, chip)
    named = next((plan for plan in plans if plan.name == forced), None)
    return replace(plans[0], why="model") if named is None else replace(named, why="named")
