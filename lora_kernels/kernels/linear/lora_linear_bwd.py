"""Backward of a LoRA linear layer with pointers: runs on every chip.

    dYB = s dY B (M, r)      dB = dY^T XA (N, r)      dbias = sum of dY's rows (N,)          one read of dY
    dX  = dY W + D/(1-p) * (dYB A) (M, K)             dA = dYB^T (D*X) / (1-p) (r, K)         one GEMM, X read once

Sums over M are split into spans: each program writes an fp32 partial, and a reduction adds the partials in a fixed
order, so the gradients are the same bits in every run (no float atomics). dA comes out of dX's epilogue, where dYB is
at hand; for ranks above one tile, or where X needs no gradient, it is a pass of its own.
The masked term opens the dX accumulator: the mask's registers are dead before the K loop begins.
"""

from __future__ import annotations

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
from lora_kernels.kernels.tiles import GemmConfig, SplitConfig, rank_tile


@triton.jit
def _dyb_db_kernel(
    dY_ptr,
    B_ptr,
    XA_ptr,
    dYB_ptr,
    dB_ptr,
    dbias_ptr,
    M,
    N,
    r,
    stride_dym,
    stride_dyn,
    stride_bn,
    stride_br,
    stride_sm,
    MAKE_DYB: tl.constexpr,
    MAKE_DB: tl.constexpr,
    MAKE_DBIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    SPAN_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Partials of dY B, dY^T XA and dY's column sums for SPAN_M rows, BLOCK_N columns, BLOCK_R ranks: one dY read."""
    span = tl.program_id(0)
    pid_n = tl.program_id(1)
    pid_r = tl.program_id(2)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_n = offs_n < N
    mask_r = offs_r < r
    LOW: tl.constexpr = XA_ptr.dtype.element_ty
    if MAKE_DYB:
        b_ptrs = B_ptr + offs_n[:, None].to(tl.int64) * stride_bn + offs_r[None, :].to(tl.int64) * stride_br
        b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0).to(LOW)
    db = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    for m in range(0, SPAN_M, BLOCK_M):
        offs_m = span * SPAN_M + m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        rows = offs_m[:, None].to(tl.int64)
        dy_ptrs = dY_ptr + rows * stride_dym + offs_n[None, :].to(tl.int64) * stride_dyn
        dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        if MAKE_DYB:
            part = tl.dot(dy.to(LOW), b, input_precision=PRECISION)
            part_ptrs = dYB_ptr + (pid_n.to(tl.int64) * M + rows) * r + offs_r[None, :]
            tl.store(part_ptrs, part, mask=mask_m[:, None] & mask_r[None, :])
        if MAKE_DB:
            s_ptrs = XA_ptr + rows * stride_sm + offs_r[None, :]
            xa = tl.load(s_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
            db = tl.dot(tl.trans(dy.to(LOW)), xa, db, input_precision=PRECISION)
        if MAKE_DBIAS:
            dbias += tl.sum(dy.to(tl.float32), axis=0)
    cols = span.to(tl.int64) * N + offs_n
    if MAKE_DB:
        tl.store(dB_ptr + cols[:, None] * r + offs_r[None, :], db, mask=mask_n[:, None] & mask_r[None, :])
    if MAKE_DBIAS and pid_r == 0:
        tl.store(dbias_ptr + cols, dbias, mask=mask_n)


@triton.jit
def _dx_kernel(
    dY_ptr,
    W_ptr,
    dYB_ptr,
    A_ptr,
    X_ptr,
    dX_ptr,
    dA_ptr,
    seed_ptr,
    keep_ptr,
    M,
    N,
    K,
    r,
    stride_keep,
    stride_dym,
    stride_dyn,
    stride_wn,
    stride_wk,
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
    """dX = dY W + factor D*(dYB A) for a tile of BLOCK_M rows and BLOCK_N columns of X, and that tile's part of dA."""
    pid_m, pid_k = tile_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = pid_k * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_k = offs_k < K
    acc = low_rank(
        dYB_ptr, A_ptr, offs_m, offs_k, mask_m, mask_k, r, stride_sm, 1, stride_ak, stride_ar, BLOCK_M, BLOCK_N,
        BLOCK_R, PRECISION,
    )  # fmt: skip
    if DROPOUT:
        col = pid_k * BLOCK_N
        keep = keep_tile(seed_ptr, keep_ptr, stride_keep, offs_m, mask_m, col, K, threshold, BLOCK_N, DROPOUT)
        acc = tl.where(keep, acc * factor, 0.0)
    acc = accumulate(
        acc, dY_ptr, W_ptr, offs_m, offs_k, mask_m, mask_k, N, stride_dym, stride_dyn, stride_wk, stride_wn, BLOCK_K,
        EVEN_N, PRECISION,
    )  # fmt: skip
    dx_ptrs = dX_ptr + offs_m[:, None].to(tl.int64) * stride_dxm + offs_k[None, :]
    tile_mask = mask_m[:, None] & mask_k[None, :]
    tl.store(dx_ptrs, acc.to(dX_ptr.dtype.element_ty), mask=tile_mask)
    if MAKE_DA:
        offs_r = tl.arange(0, BLOCK_R)
        mask_r = offs_r < r
        x_ptrs = X_ptr + offs_m[:, None].to(tl.int64) * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
        x = tl.load(x_ptrs, mask=tile_mask, other=0.0)
        if DROPOUT:
            col = pid_k * BLOCK_N
            keep = keep_tile(seed_ptr, keep_ptr, stride_keep, offs_m, mask_m, col, K, threshold, BLOCK_N, DROPOUT)
            x = tl.where(keep, x, 0.0)
        s_ptrs = dYB_ptr + offs_m[:, None].to(tl.int64) * stride_sm + offs_r[None, :]
        dyb = tl.load(s_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        da = tl.dot(tl.trans(x.to(dyb.dtype)), dyb, input_precision=PRECISION)
        da_ptrs = dA_ptr + (pid_m.to(tl.int64) * r + offs_r[None, :]) * K + offs_k[:, None]
        tl.store(da_ptrs, da, mask=mask_k[:, None] & mask_r[None, :])


@triton.jit
def _da_kernel(
    X_ptr,
    dYB_ptr,
    dA_ptr,
    seed_ptr,
    keep_ptr,
    M,
    K,
    r,
    stride_keep,
    stride_xm,
    stride_xk,
    stride_sm,
    threshold,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    SPAN_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Partial of dA = dYB^T (D*X) for SPAN_M rows, BLOCK_N columns of X and BLOCK_R ranks."""
    span = tl.program_id(0)
    pid_k = tl.program_id(1)
    offs_k = pid_k * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_k = offs_k < K
    mask_r = offs_r < r
    da = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for m in range(0, SPAN_M, BLOCK_M):
        offs_m = span * SPAN_M + m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        rows = offs_m[:, None].to(tl.int64)
        x_ptrs = X_ptr + rows * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        if DROPOUT:
            col = pid_k * BLOCK_N
            keep = keep_tile(seed_ptr, keep_ptr, stride_keep, offs_m, mask_m, col, K, threshold, BLOCK_N, DROPOUT)
            x = tl.where(keep, x, 0.0)
        dyb = tl.load(dYB_ptr + rows * stride_sm + offs_r[None, :], mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        da = tl.dot(tl.trans(x.to(dyb.dtype)), dyb, da, input_precision=PRECISION)
    da_ptrs = dA_ptr + (span.to(tl.int64) * r + offs_r[None, :]) * K + offs_k[:, None]
    tl.store(da_ptrs, da, mask=mask_k[:, None] & mask_r[None, :])


def dyb_db(
    dY: Tensor,
    B: Tensor,
    XA: Tensor,
    scaling: float,
    config: SplitConfig,
    *,
    make_dyb: bool = True,
    make_db: bool = True,
    make_dbias: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dYB (M, r) in XA's dtype, dB (N, r) in B's, dbias (N,) in dY's: two launches, one dY read per 64 ranks; M > 0."""
    (M, N), r = dY.shape, B.shape[1]
    spans, blocks_n = triton.cdiv(M, config.SPAN_M), triton.cdiv(N, config.BLOCK_N)
    BLOCK_R = rank_tile(r, dY.dtype)

    def partial(make: bool, count: int, *shape: int) -> Tensor | None:
        return torch.empty(count, *shape, dtype=torch.float32, device=dY.device) if make else None

    part_dyb = partial(make_dyb, blocks_n, M, r)
    part_db = partial(make_db, spans, N, r)
    part_dbias = partial(make_dbias, spans, N)
    launch(
        _dyb_db_kernel,
        (spans, blocks_n, triton.cdiv(r, BLOCK_R)),
        dY.device,
        dY,
        B,
        XA,
        part_dyb,
        part_db,
        part_dbias,
        M=M,
        N=N,
        r=r,
        stride_dym=dY.stride(0),
        stride_dyn=dY.stride(1),
        stride_bn=B.stride(0),
        stride_br=B.stride(1),
        stride_sm=XA.stride(0),
        MAKE_DYB=make_dyb,
        MAKE_DB=make_db,
        MAKE_DBIAS=make_dbias,
        PRECISION=precision_of(dY.dtype),
        SPAN_M=config.SPAN_M,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_R=BLOCK_R,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    sums = (Partial(part_dyb, XA.dtype, scaling), Partial(part_db, B.dtype), Partial(part_dbias, dY.dtype))
    dYB, dB, dbias = reduce_partials(*sums)
    return dYB, dB, dbias


def dx_da(
    dY: Tensor,
    W: Tensor,
    dYB: Tensor,
    A: Tensor,
    X: Tensor,
    drop: Dropout | None,
    config: GemmConfig,
    *,
    make_da: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """dX (M, K) in X's dtype, and dA (r, K) in A's from its epilogue (r <= rank_block); one or two launches."""
    (M, N), (r, K) = dY.shape, A.shape
    dX = torch.empty(M, K, dtype=X.dtype, device=X.device)
    blocks_m = triton.cdiv(M, config.BLOCK_M)
    part_da = torch.empty(blocks_m, r, K, dtype=torch.float32, device=X.device) if make_da else None
    launch(
        _dx_kernel,
        (blocks_m * triton.cdiv(K, config.BLOCK_N),),
        X.device,
        dY,
        W,
        dYB,
        A,
        X,
        dX,
        part_da,
        M=M,
        N=N,
        K=K,
        r=r,
        stride_dym=dY.stride(0),
        stride_dyn=dY.stride(1),
        stride_wn=W.stride(0),
        stride_wk=W.stride(1),
        stride_sm=dYB.stride(0),
        stride_ar=A.stride(0),
        stride_ak=A.stride(1),
        stride_xm=X.stride(0),
        stride_xk=X.stride(1),
        stride_dxm=dX.stride(0),
        factor=inv_keep(drop),
        MAKE_DA=make_da,
        EVEN_N=N % config.BLOCK_K == 0,
        PRECISION=precision_of(X.dtype),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=rank_tile(r, X.dtype),
        GROUP_M=config.GROUP_M,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **dropout_args(drop),
    )
    (dA,) = reduce_partials(Partial(part_da, A.dtype, inv_keep(drop)))
    return dX, dA


def da(dYB: Tensor, X: Tensor, drop: Dropout | None, dtype: torch.dtype, config: SplitConfig) -> Tensor:
    """dA (r, K) = dYB^T (D*X) / (1-p) in ``dtype``: two launches, X read once per 64 ranks; M > 0."""
    (M, K), r = X.shape, dYB.shape[1]
    spans, BLOCK_R = triton.cdiv(M, config.SPAN_M), rank_tile(r, X.dtype)
    part = torch.empty(spans, r, K, dtype=torch.float32, device=X.device)
    launch(
        _da_kernel,
        (spans, triton.cdiv(K, config.BLOCK_N), triton.cdiv(r, BLOCK_R)),
        X.device,
        X,
        dYB,
        part,
        M=M,
        K=K,
        r=r,
        stride_xm=X.stride(0),
        stride_xk=X.stride(1),
        stride_sm=dYB.stride(0),
        PRECISION=precision_of(X.dtype),
        SPAN_M=config.SPAN_M,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_R=BLOCK_R,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **dropout_args(drop),
    )
    (dA,) = reduce_partials(Partial(part, dtype, inv_keep(drop)))
    assert dA is not None
    return dA
