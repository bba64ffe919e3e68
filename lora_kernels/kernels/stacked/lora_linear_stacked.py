"""P LoRA linear layers of one input (q, k, v; gate, up) as one: pointer kernels for every chip.

    XA  = s_p/(1-p) (D*X) A_p^T for all p, one shrink over the stacked A (R, K), R = sum of r_p           (M, R)
    Y_p = X W_p^T + bias_p + XA_p B_p^T        one launch over the column tiles of all projections     (M, N_p)
    dX  = sum_p dY_p W_p + D/(1-p) * (dYB A)   one accumulator, one write                              (M, K)
    dA  = dYB^T (D*X) / (1-p)                  from dX's epilogue, where R fits one tile               (R, K)

A tile of the forward belongs to one projection: it picks that one's pointers and sizes out of the tuples it is given
(selects of scalars, which keep what is known of alignment) and runs the one K loop there is. A tile of dX walks N_0,
then N_1, ... with the accumulator in registers: separate layers write and read dX once more for each projection.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.common import (
    Dropout,
    accumulate,
    dropout_args,
    inv_keep,
    keep_tile,
    low_rank,
    precision_of,
    tile_order,
)
from lora_kernels.kernels.launch import launch
from lora_kernels.kernels.reduce import Partial, reduce_partials
from lora_kernels.kernels.tiles import GemmConfig, rank_tile


@triton.jit
def _pick(values, index):
    """values[index] of a tuple of scalars or pointers, for an index known at run time."""
    value = values[0]
    for p in tl.static_range(1, len(values)):
        value = tl.where(index == p, values[p], value)
    return value


@triton.jit
def _stacked_extend_kernel(
    X_ptr,
    XA_ptr,
    W_ptrs,
    B_ptrs,
    bias_ptrs,
    Y_ptrs,
    M,
    K,
    blocks,
    Ns,
    bias_Ns,
    ranks,
    rank_starts,
    stride_xm,
    stride_xk,
    stride_sm,
    strides_wn,
    strides_wk,
    strides_bn,
    strides_br,
    strides_bias,
    strides_ym,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Y_p = X W_p^T + bias_p + XA_p B_p^T, one output tile of one projection a program."""
    all_blocks = 0
    for p in tl.static_range(len(blocks)):
        all_blocks += blocks[p]
    pid_m, tile = tile_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), all_blocks, GROUP_M)
    which, first, end = 0, 0, 0
    for p in tl.static_range(len(blocks)):
        end += blocks[p]
        which += (tile >= end).to(tl.int32)  # the projections that end before this tile
        first += tl.where(tile >= end, blocks[p], 0)
    N = _pick(Ns, which)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tile - first) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    acc = low_rank(
        XA_ptr + _pick(rank_starts, which), _pick(B_ptrs, which), offs_m, offs_n, mask_m, mask_n, _pick(ranks, which),
        stride_sm, 1, _pick(strides_bn, which), _pick(strides_br, which), BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
    )  # fmt: skip
    acc = accumulate(
        acc, X_ptr, _pick(W_ptrs, which), offs_m, offs_n, mask_m, mask_n, K, stride_xm, stride_xk,
        _pick(strides_wn, which), _pick(strides_wk, which), BLOCK_K, EVEN_K, PRECISION,
    )  # fmt: skip
    if HAS_BIAS:  # of some projection; the others have a length of 0
        b_ptrs = _pick(bias_ptrs, which) + offs_n.to(tl.int64) * _pick(strides_bias, which)
        acc += tl.load(b_ptrs, mask=offs_n < _pick(bias_Ns, which), other=0.0).to(tl.float32)[None, :]
    y_ptrs = _pick(Y_ptrs, which) + offs_m[:, None].to(tl.int64) * _pick(strides_ym, which) + offs_n[None, :]
    tl.store(y_ptrs, acc.to(X_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _stacked_dx_kernel(
    dY_ptrs,
    W_ptrs,
    dYB_ptr,
    A_ptr,
    X_ptr,
    dX_ptr,
    dA_ptr,
    seed_ptr,
    keep_ptr,
    M,
    K,
    R,
    Ns,
    stride_keep,
    strides_dym,
    strides_dyn,
    strides_wn,
    strides_wk,
    stride_sm,
    stride_ar,
    stride_ak,
    stride_xm,
    stride_xk,
    stride_dxm,
    factor,
    threshold,
    MAKE_DA: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """dX = sum_p dY_p W_p + factor D*(dYB A) for BLOCK_M rows, BLOCK_N columns of X; their part of dA (R, K)."""
    pid_m, pid_k = tile_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP_M)
    col = pid_k * BLOCK_N
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = col + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_k = offs_k < K
    acc = low_rank(
        dYB_ptr, A_ptr, offs_m, offs_k, mask_m, mask_k, R, stride_sm, 1, stride_ak, stride_ar, BLOCK_M, BLOCK_N,
        BLOCK_R, PRECISION,
    )  # fmt: skip
    if DROPOUT:
        keep = keep_tile(seed_ptr, keep_ptr, stride_keep, offs_m, mask_m, col, K, threshold, BLOCK_N, DROPOUT)
        acc = tl.where(keep, acc * factor, 0.0)
    for p in tl.static_range(len(Ns)):
        acc = accumulate(
            acc, dY_ptrs[p], W_ptrs[p], offs_m, offs_k, mask_m, mask_k, Ns[p], strides_dym[p], strides_dyn[p],
            strides_wk[p], strides_wn[p], BLOCK_K, EVEN_N, PRECISION,
        )  # fmt: skip
    dx_ptrs = dX_ptr + offs_m[:, None].to(tl.int64) * stride_dxm + offs_k[None, :]
    tile_mask = mask_m[:, None] & mask_k[None, :]
    tl.store(dx_ptrs, acc.to(dX_ptr.dtype.element_ty), mask=tile_mask)
    if MAKE_DA:
        offs_r = tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        x_ptrs = X_ptr + offs_m[:, None].to(tl.int64) * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
        x = tl.load(x_ptrs, mask=tile_mask, other=0.0)
        if DROPOUT:
            keep = keep_tile(seed_ptr, keep_ptr, stride_keep, offs_m, mask_m, col, K, threshold, BLOCK_N, DROPOUT)
            x = tl.where(keep, x, 0.0)
        s_ptrs = dYB_ptr + offs_m[:, None].to(tl.int64) * stride_sm + offs_r[None, :]
        dyb = tl.load(s_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        da = tl.dot(tl.trans(x.to(dyb.dtype)), dyb, input_precision=PRECISION)
        da_ptrs = dA_ptr + (pid_m.to(tl.int64) * R + offs_r[None, :]) * K + offs_k[:, None]
        tl.store(da_ptrs, da, mask=mask_k[:, None] & mask_r[None, :])


def stacked_extend(
    X: Tensor,
    W: Sequence[Tensor],
    XA: Tensor,
    B: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    config: GemmConfig,
) -> list[Tensor]:
    """Y_p (M, N_p) = X W_p^T + bias_p + XA_p B_p^T for X (M, K), W_p (N_p, K), XA (M, R), B_p (N_p, r_p); M > 0.

    One launch. The B_p share a dtype, and so do X, the W_p and the biases.
    """
    M, K = X.shape
    Ns, ranks = tuple(w.shape[0] for w in W), tuple(b.shape[1] for b in B)
    Y = tuple(torch.empty(M, N, dtype=X.dtype, device=X.device) for N in Ns)
    blocks = tuple(triton.cdiv(N, config.BLOCK_N) for N in Ns)
    launch(
        _stacked_extend_kernel,
        (triton.cdiv(M, config.BLOCK_M) * sum(blocks),),
        X.device,
        X,
        XA,
        tuple(W),
        tuple(B),
        tuple(X if b is None else b for b in bias),  # X in place of a missing bias: it is not read
        Y,
        M=M,
        K=K,
        blocks=blocks,
        Ns=Ns,
        bias_Ns=tuple(0 if b is None else b.shape[0] for b in bias),
        ranks=ranks,
        rank_starts=tuple(sum(ranks[:p]) for p in range(len(ranks))),
        stride_xm=X.stride(0),
        stride_xk=X.stride(1),
        stride_sm=XA.stride(0),
        strides_wn=tuple(w.stride(0) for w in W),
        strides_wk=tuple(w.stride(1) for w in W),
        strides_bn=tuple(b.stride(0) for b in B),
        strides_br=tuple(b.stride(1) for b in B),
        strides_bias=tuple(1 if b is None else b.stride(0) for b in bias),
        strides_ym=tuple(y.stride(0) for y in Y),
        HAS_BIAS=any(b is not None for b in bias),
        EVEN_K=K % config.BLOCK_K == 0,
        PRECISION=precision_of(X.dtype),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=rank_tile(max(ranks), X.dtype),
        GROUP_M=config.GROUP_M,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return list(Y)


def stacked_dx(
    dY: Sequence[Tensor],
    W: Sequence[Tensor],
    dYB: Tensor,
    A: Tensor,
    X: Tensor,
    drop: Dropout | None,
    config: GemmConfig,
    *,
    make_da: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """dX (M, K) in X's dtype for dY_p (M, N_p), dYB (M, R), A (R, K); dA (R, K) in A's dtype from its epilogue.

    R is at most rank_block where ``make_da``; M > 0. One or two launches.
    """
    (M, K), R = X.shape, A.shape[0]
    dX = torch.empty(M, K, dtype=X.dtype, device=X.device)
    blocks_m = triton.cdiv(M, config.BLOCK_M)
    part_da = torch.empty(blocks_m, R, K, dtype=torch.float32, device=X.device) if make_da else None
    Ns = tuple(w.shape[0] for w in W)
    launch(
        _stacked_dx_kernel,
        (blocks_m * triton.cdiv(K, config.BLOCK_N),),
        X.device,
        tuple(dY),
        tuple(W),
        dYB,
        A,
        X,
        dX,
        part_da,
        M=M,
        K=K,
        R=R,
        Ns=Ns,
        strides_dym=tuple(dy.stride(0) for dy in dY),
        strides_dyn=tuple(dy.stride(1) for dy in dY),
        strides_wn=tuple(w.stride(0) for w in W),
        strides_wk=tuple(w.stride(1) for w in W),
        stride_sm=dYB.stride(0),
        stride_ar=A.stride(0),
        stride_ak=A.stride(1),
        stride_xm=X.stride(0),
        stride_xk=X.stride(1),
        stride_dxm=dX.stride(0),
        factor=inv_keep(drop),
        MAKE_DA=make_da,
        EVEN_N=all(N % config.BLOCK_K == 0 for N in Ns),
        PRECISION=precision_of(X.dtype),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=rank_tile(R, X.dtype),
        GROUP_M=config.GROUP_M,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **dropout_args(drop),
    )
    (dA,) = reduce_partials(Partial(part_da, A.dtype, inv_keep(drop)))
    return dX, dA
