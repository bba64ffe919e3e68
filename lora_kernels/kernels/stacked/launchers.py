"""Launch sequences of the plans of P LoRA linear layers of one input. Importing this module imports Triton.

    XA  = [s_p/(1-p) (D*X) A_p^T ...]       Y_p = X W_p^T + bias_p + XA_p B_p^T
    dYB = [s_p dY_p B_p ...]                dX  = sum_p dY_p W_p + D/(1-p) * (dYB A)     dA = dYB^T (D*X) / (1-p)

eager          products by the vendor's library: one over the stacked weight if the W_p are adjacent in memory, else one
               for each projection; each update is added to its part
shrink_extend  shrink, then one launch for all Y_p; backward one launch for dX, and dA from its epilogue
planning/stacked_cost.py has the launches of each plan as data, and chooses the plan.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_kernels.kernels.chip import Chip
from lora_kernels.kernels.common import Dropout
from lora_kernels.kernels.linear.expand import add_update_, expand_add_, library_low_rank
from lora_kernels.kernels.linear.lora_linear_bwd import da, dyb_db
from lora_kernels.kernels.linear.shrink import shrink
from lora_kernels.kernels.stacked.lora_linear_stacked import stacked_dx, stacked_extend
from lora_kernels.kernels.tiles import (
    GemmConfig,
    expand_config,
    gemm_config,
    rank_block,
    shrink_config,
    split_config,
    wide_loads,
)
from lora_kernels.operands.dtypes import low_rank_dtype

Tensors = Sequence[Tensor]
Grads = list[Tensor | None]


def stack(parts: Tensors) -> Tensor:
    """The parts concatenated along the rows; a single part is returned unchanged."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _make_xa(
    X: Tensor, A: Tensors, scaling: Sequence[float], drop: Dropout | None, library: bool, chip: Chip, wide: bool
) -> Tensor:
    """XA (M, R). The columns of projection p are scaled by s_p as fp32 sums. Fills ``drop.bits``."""
    A_all, M, dtype = stack(A), X.shape[0], X.dtype
    R, same = A_all.shape[0], len(set(scaling)) == 1
    if library and library_low_rank(dtype, drop) and same:
        return torch.addmm(X.new_empty(M, R), X, A_all.to(dtype).t(), beta=0, alpha=scaling[0])
    tiles = shrink_config(M, dtype, chip, R, drop is not None, wide)
    firsts = itertools.accumulate((a.shape[0] for a in A[:-1]), initial=0)
    later = () if same else tuple(zip(firsts, scaling, strict=True))[1:]
    return shrink(X, A_all, scaling[0], drop, tiles, later)


def _shared_parts(Y: Tensor, Ns: Sequence[int]) -> list[Tensor]:
    """Y's columns as separate tensors on Y's memory. Not views, so autograd allows in-place changes of each."""
    starts = [sum(Ns[:p]) for p in range(len(Ns))]
    storage, stride = Y.untyped_storage(), Y.stride()
    return [Y.new_empty(0).set_(storage, at, (Y.shape[0], N), stride) for at, N in zip(starts, Ns, strict=True)]  # type: ignore[arg-type]


def lora_linear_stacked_fwd(
    X: Tensor,
    W: Tensors,
    A: Tensors,
    B: Tensors,
    bias: Sequence[Tensor | None],
    scaling: Sequence[float],
    drop: Dropout | None,
    plan: str,
    chip: Chip,
    W_all: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Y_p (M, N_p) and XA (M, R) by ``plan``; M > 0. Fills ``drop.bits`` if they exist.

    ``W_all`` (sum of N_p, K): all W_p as one tensor, or None. With it the eager plan computes one product, whose memory
    the Y_p share.
    """
    M, dtype, Ns = X.shape[0], X.dtype, [w.shape[0] for w in W]
    wide = wide_loads(X, *W)
    XA = _make_xa(X, A, scaling, drop, plan == "eager", chip, wide)
    if plan != "eager":
        return stacked_extend(X, W, XA, B, bias, gemm_config(M, sum(Ns), dtype, chip, wide)), XA
    if W_all is None or len(W) == 1:
        Y = [torch.nn.functional.linear(X, w, b) for w, b in zip(W, bias, strict=True)]
    else:
        filled = [X.new_zeros(N) if b is None else b for N, b in zip(Ns, bias, strict=True)]
        bias_all = torch.cat(filled) if any(b is not None for b in bias) else None
        Y = _shared_parts(torch.nn.functional.linear(X, W_all, bias_all), Ns)
    for y, xa, b in zip(Y, XA.split_with_sizes([b.shape[1] for b in B], 1), B, strict=True):
        if xa.dtype is dtype:
            y.addmm_(xa, b.to(dtype).t())
        else:
            add_update_(y, xa, b, chip)
    return Y, XA


def low_rank_grads(
    dY: Tensors,
    B: Tensors,
    XA: Tensors,
    scaling: Sequence[float],
    make_dyb: bool,
    make_db: Sequence[bool],
    make_dbias: Sequence[bool],
    plan: str,
    chip: Chip,
) -> tuple[Tensor | None, Grads, Grads]:
    """dYB (M, R), the dB_p in B's dtype and the dbias_p: every dY_p is read once (eager: once for each).

    For float16 every plan uses our kernels: the library cannot return float32 products of float16 operands.
    """
    M, dtype = dY[0].shape[0], dY[0].dtype
    if plan == "eager" and low_rank_dtype(dtype) is dtype:
        dB = [(dy.t() @ xa).to(b.dtype) if need else None for dy, xa, b, need in zip(dY, XA, B, make_db, strict=True)]
        dbias = [dy.sum(0) if need else None for dy, need in zip(dY, make_dbias, strict=True)]
        if not make_dyb:
            return None, dB, dbias
        ranks = [b.shape[1] for b in B]
        dYB = dY[0].new_empty(M, sum(ranks))
        for part, dy, b, s in zip(dYB.split_with_sizes(ranks, 1), dY, B, scaling, strict=True):
            torch.addmm(part, dy, b.to(dtype), beta=0, alpha=s, out=part)
        return dYB, dB, dbias
    made = []
    for dy, b, xa, s, need_b, need_bias in zip(dY, B, XA, scaling, make_db, make_dbias, strict=True):
        split = split_config(M, dtype, chip, b.shape[1])
        if make_dyb or need_b or need_bias:
            made.append(dyb_db(dy, b, xa, s, split, make_dyb=make_dyb, make_db=need_b, make_dbias=need_bias))
        else:
            made.append((None, None, None))
    parts = [part for part, _, _ in made if part is not None]
    dYB_all = None if not make_dyb else parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return dYB_all, [db for _, db, _ in made], [dbias for _, _, dbias in made]


def dx_config(M: int, K: int, drop: Dropout | None, dtype: torch.dtype, chip: Chip, wide: bool) -> GemmConfig:
    """Tiles of stacked_dx: the GEMM's, half as wide if the mask is drawn (128 x 128 spills on sm_80 and sm_90)."""
    tiles = gemm_config(M, K, dtype, chip, wide)
    drawn = drop is not None and drop.bits is None
    return replace(tiles, BLOCK_N=min(tiles.BLOCK_N, 64)) if drawn else tiles


def dx_of(
    dY: Tensors,
    W: Tensors,
    dYB: Tensor,
    A: Tensor,
    X: Tensor,
    drop: Dropout | None,
    plan: str,
    chip: Chip,
    need_a: bool,
) -> tuple[Tensor, Tensor | None]:
    """dX (M, K) = sum_p dY_p W_p + D/(1-p) * (dYB A), and dA (R, K) if ``need_a`` and dX's epilogue computes it.

    If it does not, and always in the eager plan, only X.shape is used, not the values of X.
    """
    (M, K), dtype = X.shape, X.dtype
    wide = wide_loads(*dY, *W, X)
    if plan != "eager":
        make_da = need_a and A.shape[0] <= rank_block(dtype)
        return stacked_dx(dY, W, dYB, A, X, drop, dx_config(M, K, drop, dtype, chip, wide), make_da=make_da)
    dX = dY[0] @ W[0]
    for dy, w in zip(dY[1:], W[1:], strict=True):
        dX.addmm_(dy, w)
    if library_low_rank(dtype, drop):
        return dX.addmm_(dYB, A.to(dtype)), None
    return expand_add_(dX, dYB, A, drop, expand_config(M, K, dtype, chip, wide)), None


def da_of(dYB: Tensor, X: Tensor, drop: Dropout | None, dtype: torch.dtype, plan: str, chip: Chip) -> Tensor:
    """dA (R, K) = dYB^T (D*X) / (1-p) in ``dtype``, by a separate pass over X."""
    if plan == "eager" and library_low_rank(X.dtype, drop):
        return (dYB.t() @ X).to(dtype)
    return da(dYB, X, drop, dtype, split_config(X.shape[0], X.dtype, chip, dYB.shape[1]))


def lora_linear_stacked_bwd(
    dY: Tensors,
    X: Tensor,
    W: Tensors,
    A: Tensors,
    B: Tensors,
    XA: Tensors,
    scaling: Sequence[float],
    drop: Dropout | None,
    need_x: bool,
    need_a: bool,
    need_b: Sequence[bool],
    need_bias: Sequence[bool],
    plan: str,
    chip: Chip,
) -> tuple[Tensor | None, Tensor | None, Grads, Grads]:
    """dX (M, K), dA (R, K), the dB_p and dbias_p by ``plan``; None for each that is not needed; M > 0."""
    dX = dA = None
    dYB, dB, dbias = low_rank_grads(dY, B, XA, scaling, need_x or need_a, need_b, need_bias, plan, chip)
    if dYB is not None and need_x:
        dX, dA = dx_of(dY, W, dYB, stack(A), X, drop, plan, chip, need_a)
    if dYB is not None and need_a and dA is None:
        dA = da_of(dYB, X, drop, A[0].dtype, plan, chip)
    return dX, dA, dB, dbias
