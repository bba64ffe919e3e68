"""lora_kernels::lora_mlp_fwd and _bwd: schema, fake implementation, and the planned parts in order.

As in ops/lora_linear.py, eager code calls the two functions directly, a compiled graph goes through torch.ops.
Lists hold values of (gate, up, down).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.ops.lora_linear import _empty_bits, _keep, empty_low_rank, lora_linear_fwd
from lora_kernels.ops.lora_linear_stacked import (
    Tensors,
    lora_linear_stacked_fwd,
    no_grads_as_empty,
    stacked_problem,
)
from lora_kernels.planning import choose as planner
from lora_kernels.planning import stacked_cost
from lora_kernels.reference import lora_mlp as reference
from lora_kernels.reference.lora_mlp import MLPGrads, MLPNeeds

_FWD = (
    "lora_mlp_fwd(Tensor X, Tensor[] W, Tensor[] A, Tensor[] B, Tensor?[] bias, float[] scaling, float p, "
    "Tensor? seeds, str backend, bool keep_bits) "
    "-> (Tensor Y, Tensor G, Tensor U, Tensor XA, Tensor HA, Tensor keep_x, Tensor keep_h)"
)
_BWD = (
    "lora_mlp_bwd(Tensor dY, Tensor X, Tensor G, Tensor U, Tensor[] W, Tensor[] A, Tensor[] B, Tensor[] XA, Tensor HA, "
    "float[] scaling, float p, Tensor? seeds, Tensor? keep_x, Tensor? keep_h, bool need_x, bool[] need_a, "
    "bool[] need_b, bool[] need_bias, str backend) "
    "-> (Tensor dX, Tensor dA, Tensor dA_down, Tensor[] dB, Tensor[] dbias)"
)


class Kept(NamedTuple):
    """Values kept for the backward: G, U (M, F), XA (M, R), HA (M, r), and dropout's bits of X and H."""

    G: Tensor
    U: Tensor
    XA: Tensor
    HA: Tensor
    keep_x: Tensor | None
    keep_h: Tensor | None


def lora_mlp_fwd(
    X: Tensor,
    W: Tensors,
    A: Tensors,
    B: Tensors,
    bias: Sequence[Tensor | None],
    scaling: Sequence[float],
    p: float,
    seeds: Tensor | None,
    backend: str,
    keep_bits: bool = False,
    share: bool = True,
) -> tuple[Tensor, Kept]:
    """Y (M, N) = down(silu(gate(X)) * up(X)) for X (M, K), and the kept values.

    ``seeds`` int64 (2, 2), for the masks of X and H, enables dropout; the rest as in the stacked operator.
    """
    seed_x, seed_h = (None, None) if seeds is None else seeds.unbind()
    if planner.split_name(backend)[0] == "triton" and X.shape[0] > 0:
        first = W[:2], A[:2], B[:2], bias[:2], scaling[:2]
        (G, U), XA, keep_x = lora_linear_stacked_fwd(X, *first, p, seed_x, backend, keep_bits, share)
        H = planner.triton_kernels().swiglu(G, U)
        last = W[2], A[2], B[2], bias[2], scaling[2]
        Y, HA, keep_h = lora_linear_fwd(H, *last, p, seed_h, backend, keep_bits)
        return Y, Kept(G, U, XA, HA, keep_x, keep_h)
    like_h = X[:, :1].expand(-1, B[0].shape[0])  # its shape and dtype
    keep = _keep(X, p, seed_x), _keep(like_h, p, seed_h)
    Y, G, U, XA, HA = reference.lora_mlp_fwd(X, W, A, B, bias, scaling, *keep, p)
    return Y, Kept(G, U, XA, HA, None, None)


def lora_mlp_bwd(
    dY: Tensor,
    X: Tensor,
    G: Tensor,
    U: Tensor,
    W: Tensors,
    A: Tensors,
    B: Tensors,
    XA: Tensors,
    HA: Tensor,
    scaling: Sequence[float],
    p: float,
    seeds: Tensor | None,
    keep_x: Tensor | None,
    keep_h: Tensor | None,
    needs: MLPNeeds,
    backend: str,
) -> MLPGrads:
    """The gradients of lora_mlp_fwd selected by ``needs``, for dY (M, N); XA as the blocks of gate and up."""
    seed_x, seed_h = (None, None) if seeds is None else seeds.unbind()
    kind, forced = planner.split_name(backend)
    if kind == "triton" and X.shape[0] > 0:
        chip, dropout = planner.chip_for(X.device), seeds is not None
        upper = stacked_problem("bwd", X, W[:2], A[:2], scaling[:2], dropout, need_dx=needs.X, bits=keep_x is not None)
        lower = stacked_problem("bwd", G, W[2:], A[2:], scaling[2:], dropout, bits=keep_h is not None)
        plans = tuple(stacked_cost.choose(problem, chip, forced).name for problem in (upper, lower))
        kernels = planner.triton_kernels()
        drops = [None if seeds is None else kernels.Dropout(p, s, k) for s, k in ((seed_x, keep_x), (seed_h, keep_h))]
        return MLPGrads(*kernels.lora_mlp_bwd(dY, X, G, U, W, A, B, XA, HA, scaling, *drops, *needs, plans, chip))
    keep = _keep(X, p, seed_x), _keep(G, p, seed_h)
    return reference.lora_mlp_bwd(dY, X, G, U, W, A, B, XA, HA, scaling, *keep, p, needs)


def _fwd_impl(X: Tensor, *args: Any) -> tuple[Tensor, ...]:
    args = (X, *args, False)  # outputs of an operator must not share memory
    Y, kept = lora_mlp_fwd(*args)
    bits = (X.new_empty(0, dtype=torch.uint8) if keep is None else keep for keep in (kept.keep_x, kept.keep_h))
    return Y, kept.G, kept.U, kept.XA, kept.HA, *bits


def _fwd_fake(
    X: Tensor,
    W: list[Tensor],
    A: list[Tensor],
    B: list[Tensor],
    bias: list[Tensor | None],
    scaling: list[float],
    p: float,
    seeds: Tensor | None,
    backend: str,
    keep_bits: bool,
) -> tuple[Tensor, ...]:
    M, F = X.shape[0], B[0].shape[0]
    kept = keep_bits and seeds is not None and planner.split_name(backend)[0] == "triton"
    made = [X.new_empty(shape) for shape in ((M, B[2].shape[0]), (M, F), (M, F))]
    made += [empty_low_rank(X, r) for r in (A[0].shape[0] + A[1].shape[0], A[2].shape[0])]
    bits = (_empty_bits(t) if kept else X.new_empty(0, dtype=torch.uint8) for t in (X, made[1]))
    return *made, *bits


def _bwd_impl(dY: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    *operands, need_x, need_a, need_b, need_bias, backend = args
    needs = MLPNeeds(need_x, need_a, need_b, need_bias)
    grads = lora_mlp_bwd(*(dY, *operands, needs, backend))
    dX, dA, dA_down = no_grads_as_empty(grads[:3], dY)
    return dX, dA, dA_down, no_grads_as_empty(grads.B, dY), no_grads_as_empty(grads.bias, dY)


def _bwd_fake(
    dY: Tensor,
    X: Tensor,
    G: Tensor,
    U: Tensor,
    W: list[Tensor],
    A: list[Tensor],
    B: list[Tensor],
    XA: list[Tensor],
    HA: Tensor,
    scaling: list[float],
    p: float,
    seeds: Tensor | None,
    keep_x: Tensor | None,
    keep_h: Tensor | None,
    need_x: bool,
    need_a: list[bool],
    need_b: list[bool],
    need_bias: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    def made(need: bool, *like: Tensor, shape: Any = None) -> Tensor:
        return like[0].new_empty(shape or like[0].shape) if need else dY.new_empty(0)

    R = A[0].shape[0] + A[1].shape[0]
    dB = [made(need, b) for b, need in zip(B, need_b, strict=True)]
    dbias = [made(need, dY, shape=(b.shape[0],)) for b, need in zip(B, need_bias, strict=True)]
    dA = made(any(need_a[:2]), A[0], shape=(R, X.shape[1]))
    return made(need_x, X), dA, made(need_a[2], A[2]), dB, dbias


_library = torch.library.Library("lora_kernels", "FRAGMENT")
for _schema, _impl, _fake in ((_FWD, _fwd_impl, _fwd_fake), (_BWD, _bwd_impl, _bwd_fake)):
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora_kernels::{_name}", _fake, lib=_library)
