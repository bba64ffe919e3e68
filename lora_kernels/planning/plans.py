"""The plans of a LoRA linear layer as one table: launches, tiles, and the calls that each plan refuses.

A new kernel variant is one entry of VARIANTS (and its kernel's cost in cost.py): the planner, explain, tune and the
tests read the table.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

from lora_kernels.errors import ConfigError
from lora_kernels.kernels.chip import Chip
from lora_kernels.kernels.hopper.gluon_tiles import GluonConfig, gluon_config
from lora_kernels.kernels.hopper.gluon_tiles import refusal as gluon_refusal
from lora_kernels.kernels.tiles import (
    gemm_config,
    is_valid,
    one_pass_config,
    ptr_one_launch_config,
    rank_block,
    shrink_config,
    split_config,
    tma_config,
    tma_dx_config,
    tma_rows,
)
from lora_kernels.operands.dtypes import low_rank_dtype
from lora_kernels.planning.cost import KERNELS, CallShape, Launch, Tiles, expand, library, makes_da, reduce_da

Choice = Callable[[CallShape, Chip], Tiles]
Refusal = Callable[[CallShape, Chip], str | None]


def _nothing_else(q: CallShape, chip: Chip) -> str | None:
    return None


@dataclass(frozen=True)
class Pass:
    """One direction of a plan.

    ``launches``: maps a CallShape to its launches, in order. ``tiles``: the default configuration of the main product;
    None if the vendor's library computes it. ``others``: configurations of the other kernels, which must also be
    valid. ``refusal``: any other reason why it cannot run, or None. ``descriptors``: it reads its matrices by TMA.
    """

    launches: Callable[[CallShape], tuple[Launch, ...]]
    tiles: Choice | None = None
    others: tuple[Choice, ...] = ()
    refusal: Refusal = _nothing_else
    descriptors: bool = False

    def refused(self, q: CallShape, chip: Chip, tiles: Tiles | None = None) -> str | None:
        """Why it cannot run with ``tiles`` (None: the default ones), or None if it can."""
        if self.descriptors:
            if reason := tma_rows(q.N, q.K, q.dtype):
                return reason
            if not q.descriptors:
                return "the tensors of this call do not lie in memory as TMA descriptors need them"
        if reason := self.refusal(q, chip):
            return reason
        main = () if self.tiles is None else (tiles or self.tiles(q, chip),)
        configs = (*main, *(other(q, chip) for other in self.others))
        return next((why for c in configs if (why := invalid(c, q, chip))), None)


def invalid(tiles: Tiles, q: CallShape, chip: Chip) -> str | None:
    """Why a kernel of q's dtype and rank cannot run with ``tiles`` on ``chip``; None if it can."""
    if isinstance(tiles, GluonConfig):
        return gluon_refusal(tiles, q.dtype, q.r, chip)
    return is_valid(tiles, q.dtype, q.r, chip)


@dataclass(frozen=True)
class Variant:
    """A plan. ``opt_in``: it runs only if it is named or chosen by a tuned table of this GPU, since it has not been
    measured on a GPU yet. ``backward``: for a plan without a backward, the plan that runs the backward if this one is
    named; None: the planner's own choice.
    """

    name: str
    fwd: Pass
    bwd: Pass | None = None
    opt_in: bool = False
    backward: str | None = None


def _made_by(*kernels: str) -> Callable[[CallShape], tuple[Launch, ...]]:
    return lambda q: tuple(KERNELS[kernel](q) for kernel in kernels)


def _library_cannot(q: CallShape) -> bool:
    """Whether operands of the products of rank r have two dtypes; the vendor's library cannot multiply those."""
    return low_rank_dtype(q.dtype) is not q.dtype


def _eager_fwd(q: CallShape) -> tuple[Launch, ...]:
    e = q.dtype.itemsize
    ours = _library_cannot(q)
    xa = KERNELS["shrink"](q) if ours or q.dropout else library("XA", q.M, q.r, q.K, e)
    add = expand(replace(q, K=q.N, dropout=False)) if ours else library("addmm_", q.M, q.N, q.r, e, add=True)
    return xa, library("matmul", q.M, q.N, q.K, e), add


def _eager_bwd(q: CallShape) -> tuple[Launch, ...]:
    e = q.dtype.itemsize
    ours = _library_cannot(q)
    parts = [library("dYB", q.M, q.r, q.N, e), library("dB", q.N, q.r, q.M, e)]
    if ours:
        parts = [KERNELS["dyb_db"](q), KERNELS["reduce"](q)]
    if q.need_dx:
        add = expand(q) if ours or q.dropout else library("addmm_", q.M, q.K, q.r, e, add=True)
        parts += [library("matmul", q.M, q.K, q.N, e), add]
    parts += [KERNELS["da"](q), reduce_da(q)] if ours or q.dropout else [library("dA", q.r, q.K, q.M, e)]
    return tuple(parts)


def _split_bwd(dx: str) -> Callable[[CallShape], tuple[Launch, ...]]:
    """dyb_db, then dX by kernel ``dx`` with dA in its epilogue if it fits, else dA in a separate pass."""

    def launches(q: CallShape) -> tuple[Launch, ...]:
        parts = [KERNELS["dyb_db"](q), KERNELS["reduce"](q)]
        parts += [KERNELS[dx](q)] if q.need_dx else []
        parts += [] if q.need_dx and makes_da(q) else [KERNELS["da"](q)]
        return (*parts, reduce_da(q))

    return launches


def _gemm(q: CallShape, chip: Chip) -> Tiles:
    return gemm_config(q.M, q.N if q.op == "fwd" else q.K, q.dtype, chip)


def _shrink(q: CallShape, chip: Chip) -> Tiles:
    return shrink_config(q.M, q.dtype, chip, q.r, q.dropout)


def _split(q: CallShape, chip: Chip) -> Tiles:
    return split_config(q.M, q.dtype, chip, q.r)


def _one_pass(q: CallShape, chip: Chip) -> Tiles:
    return one_pass_config(q.M, q.dtype, chip, q.dropout)


def _tma(q: CallShape, chip: Chip) -> Tiles:
    return tma_config(q.M, q.N, q.r, q.dtype, chip)


def _tma_dx(q: CallShape, chip: Chip) -> Tiles:
    return tma_dx_config(q.M, q.K, q.r, q.dtype, chip)


def _ptr(q: CallShape, chip: Chip) -> Tiles:
    return ptr_one_launch_config(q.M, q.N, q.r, q.dtype, chip)


def _gluon(q: CallShape, chip: Chip) -> Tiles:
    return gluon_config(q.M, q.N if q.op == "fwd" else q.K, q.r, q.dtype, chip)


def _one_rank_tile(q: CallShape, chip: Chip) -> str | None:
    return f"r={q.r} is above {rank_block(q.dtype)}, one tile of ranks" if not makes_da(q) else None


def _draws_no_mask(q: CallShape, chip: Chip) -> str | None:
    if q.dropout:
        return "dropout's mask is drawn by the shrink pass, which it does not have; the extend plans have"
    return None


def _ptr_one_launch(q: CallShape, chip: Chip) -> str | None:
    return _draws_no_mask(q, chip) or _one_rank_tile(q, chip)


def _reads_bits(q: CallShape, chip: Chip) -> str | None:
    if q.dropout and not q.bits and q.need_dx:
        return "its dX kernel reads dropout's mask as bits, which this call did not keep (dropout_mask='bits' does)"
    return None


VARIANTS = (
    Variant("eager", Pass(_eager_fwd), Pass(_eager_bwd)),
    Variant(
        "shrink_extend",
        Pass(_made_by("shrink", "extend"), _gemm, (_shrink,)),
        Pass(_split_bwd("dx_da"), _gemm, (_split,)),
    ),
    Variant("one_pass", Pass(_made_by("one_pass"), _one_pass, refusal=_one_rank_tile)),
    Variant(
        "tma_extend",
        Pass(_made_by("shrink", "tma_extend"), _tma, (_shrink,), descriptors=True),
        Pass(_split_bwd("tma_dx"), _tma_dx, (_split,), _reads_bits, descriptors=True),
        opt_in=True,
    ),
    Variant(
        "one_launch",
        Pass(_made_by("one_launch"), _tma, refusal=_draws_no_mask, descriptors=True),
        opt_in=True,
        backward="tma_extend",
    ),
    Variant(
        "gluon_extend",
        Pass(_made_by("shrink", "gluon_extend"), _gluon, (_shrink,), descriptors=True),
        Pass(_split_bwd("gluon_dx"), _gluon, (_split,), _reads_bits, descriptors=True),
        opt_in=True,
    ),
    Variant(
        "gluon_one_launch",
        Pass(_made_by("gluon_one_launch"), _gluon, refusal=_draws_no_mask, descriptors=True),
        opt_in=True,
        backward="gluon_extend",
    ),
    Variant("ptr_one_launch", Pass(_made_by("ptr_one_launch"), _ptr, refusal=_ptr_one_launch), opt_in=True),
)
BY_NAME = {variant.name: variant for variant in VARIANTS}
SWITCH = "LORA_KERNELS_DISABLE"
MULTI = ("extend", "decode")  # plans that only the linear layer with many adapters has: multi_plan.py


def switched_off(name: str) -> str | None:
    """The reason if LORA_KERNELS_DISABLE names this plan, else None. The eager plan cannot be switched off.

    Raises:
        ConfigError: the variable names an unknown plan.
    """
    given = [word for word in os.environ.get(SWITCH, "").split(",") if word]
    names = [*(name for name in BY_NAME if name != "eager"), *MULTI, "cuda", "cpp"]
    if unknown := [word for word in given if word not in names]:
        others = ", ".join(names)
        raise ConfigError(f"{SWITCH} names {', '.join(unknown)}; accepted are {others}, with commas between")
    return f"switched off by {SWITCH}" if name in given else None


def launches(name: str, problem: CallShape) -> tuple[Launch, ...]:
    """The launches of plan ``name`` for ``problem``, in order. KeyError for a plan without that direction."""
    direction = BY_NAME[name].fwd if problem.op == "fwd" else BY_NAME[name].bwd
    if direction is None:
        raise KeyError(f"{name} has no {problem.op}")
    return direction.launches(problem)
