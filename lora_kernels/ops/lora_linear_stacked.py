"""lora_kernels::lora_linear_stacked_fwd and _bwd: schema, fake implementation, call of the planned implementation.

As in ops/lora_linear.py, eager code calls the two functions directly, a compiled graph goes through torch.ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.formats.side_by_side import as_one
from lora_kernels.ops.lora_linear import _empty_bits, _keep, empty_low_rank
from lora_kernels.planning import choose as planner
from lora_kernels.planning import stacked_cost
from lora_kernels.planning.stacked_cost import StackedCallShape
from lora_kernels.reference import lora_linear_stacked as reference
from lora_kernels.reference.lora_linear_stacked import StackedNeeds

Tensors = Sequence[Tensor]
Grads = list[Tensor | None]

_FWD = (
    "lora_linear_stacked_fwd(Tensor X, Tensor[] W, Tensor[] A, Tensor[] B, Tensor?[] bias, float[] scaling, float p, "
    "Tensor? seed, str backend, bool keep_bits) -> (Tensor[] Y, Tensor XA, Tensor keep)"
)
_BWD = (
    "lora_linear_stacked_bwd(Tensor[] dY, Tensor X, Tensor[] W, Tensor[] A, Tensor[] B, Tensor[] XA, float[] scaling, "
    "float p, Tensor? seed, Tensor? keep, bool need_x, bool need_a, bool[] need_b, bool[] need_bias, str backend) "
    "-> (Tensor dX, Tensor dA, Tensor[] dB, Tensor[] dbias)"
)


def stacked_problem(
    op: str, X: Tensor, W: Tensors, A: Tensors, scaling: Sequence[float], dropout: bool, **more: bool
) -> StackedCallShape:
    """The planner's key of a call."""
    Ns, ranks = tuple(w.shape[0] for w in W), tuple(a.shape[0] for a in A)
    one_scaling = len(set(scaling)) == 1
    return StackedCallShape(op, X.shape[0], Ns, X.shape[1], ranks, X.dtype, dropout, one_scaling=one_scaling, **more)


def lora_linear_stacked_fwd(
    X: Tensor,
    W: Tensors,
    A: Tensors,
    B: Tensors,
    bias: Sequence[Tensor | None],
    scaling: Sequence[float],
    p: float,
    seed: Tensor | None,
    backend: str,
    keep_bits: bool = False,
    share: bool = True,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """The Y_p (M, N_p), XA (M, R) and the mask's bits for X (M, K), which all projections read with one mask.

    ``seed`` int64 (2,) enables dropout, ``backend`` is a resolved name, ``keep_bits`` as in lora_linear_fwd.
    ``share``: the Y_p may be views of one buffer, so that the library can compute one product.
    """
    kind, forced = planner.split_name(backend)
    if kind == "triton" and X.shape[0] > 0:
        W_all = as_one(W) if share else None
        kept = keep_bits and seed is not None
        problem = stacked_problem("fwd", X, W, A, scaling, seed is not None, bits=kept, adjacent=W_all is not None)
        chip = planner.chip_for(X.device)
        plan = stacked_cost.choose(problem, chip, forced)
        kernels = planner.triton_kernels()
        keep = _empty_bits(X) if kept else None
        drop = None if seed is None else kernels.Dropout(p, seed, keep)
        made = kernels.lora_linear_stacked_fwd(X, W, A, B, bias, scaling, drop, plan.name, chip, W_all)
        return *made, keep
    return *reference.lora_linear_stacked_fwd(X, W, A, B, bias, scaling, _keep(X, p, seed), p), None


def lora_linear_stacked_bwd(
    dY: Tensors,
    X: Tensor,
    W: Tensors,
    A: Tensors,
    B: Tensors,
    XA: Tensors,
    scaling: Sequence[float],
    p: float,
    seed: Tensor | None,
    keep: Tensor | None,
    needs: StackedNeeds,
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Grads, Grads]:
    """dX, dA (R, K), the dB_p and dbias_p of lora_linear_stacked_fwd; None for each that ``needs`` excludes.

    Every list, XA's blocks (M, r_p) among them, holds the projections that have a gradient dY_p (M, N_p), no others.
    """
    kind, forced = planner.split_name(backend)
    if kind == "triton" and X.shape[0] > 0:
        problem = stacked_problem("bwd", X, W, A, scaling, seed is not None, need_dx=needs.X, bits=keep is not None)
        chip = planner.chip_for(X.device)
        plan = stacked_cost.choose(problem, chip, forced)
        kernels = planner.triton_kernels()
        drop = None if seed is None else kernels.Dropout(p, seed, keep)
        return kernels.lora_linear_stacked_bwd(dY, X, W, A, B, XA, scaling, drop, *needs, plan.name, chip)
    return reference.lora_linear_stacked_bwd(dY, X, W, A, B, XA, scaling, _keep(X, p, seed), p, needs)


def no_grads_as_empty(grads: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """Replace None by an empty tensor: a schema has no optional outputs."""
    return [like.new_empty(0) if grad is None else grad for grad in grads]


def _fwd_impl(X: Tensor, *args: Any) -> tuple[list[Tensor], Tensor, Tensor]:
    args = (X, *args, False)  # outputs of an operator must not share memory
    Y, XA, keep = lora_linear_stacked_fwd(*args)
    return Y, XA, X.new_empty(0, dtype=torch.uint8) if keep is None else keep


def _fwd_fake(
    X: Tensor,
    W: list[Tensor],
    A: list[Tensor],
    B: list[Tensor],
    bias: list[Tensor | None],
    scaling: list[float],
    p: float,
    seed: Tensor | None,
    backend: str,
    keep_bits: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    kept = keep_bits and seed is not None and planner.split_name(backend)[0] == "triton"
    keep = _empty_bits(X) if kept else X.new_empty(0, dtype=torch.uint8)
    Y = [X.new_empty(X.shape[0], b.shape[0]) for b in B]
    return Y, empty_low_rank(X, sum(a.shape[0] for a in A)), keep


def _bwd_impl(dY: list[Tensor], X: Tensor, *args: Any) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    *operands, need_x, need_a, need_b, need_bias, backend = args
    needs = StackedNeeds(need_x, need_a, need_b, need_bias)
    dX, dA, dB, dbias = lora_linear_stacked_bwd(*(dY, X, *operands, needs, backend))
    first, second = no_grads_as_empty((dX, dA), X)
    return first, second, no_grads_as_empty(dB, X), no_grads_as_empty(dbias, X)


def _bwd_fake(
    dY: list[Tensor],
    X: Tensor,
    W: list[Tensor],
    A: list[Tensor],
    B: list[Tensor],
    XA: list[Tensor],
    scaling: list[float],
    p: float,
    seed: Tensor | None,
    keep: Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: list[bool],
    need_bias: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    empty = X.new_empty(0)
    dX = X.new_empty(X.shape) if need_x else empty
    dA = A[0].new_empty(sum(a.shape[0] for a in A), X.shape[1]) if need_a else X.new_empty(0)
    dB = [b.new_empty(b.shape) if need else X.new_empty(0) for b, need in zip(B, need_b, strict=True)]
    dbias = [X.new_empty(b.shape[0]) if need else X.new_empty(0) for b, need in zip(B, need_bias, strict=True)]
    return dX, dA, dB, dbias


_library = torch.library.Library("lora_kernels", "FRAGMENT")
for _schema, _impl, _fake in ((_FWD, _fwd_impl, _fwd_fake), (_BWD, _bwd_impl, _bwd_fake)):
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora_kernels::{_name}", _fake, lib=_library)
