"""XA = factor * (D*X) A^T: one pass over X that computes the low-rank activations.

    X (M, K), A (r, K) -> XA (M, r) in low_rank_dtype of X's;  D = dropout's keep mask, factor = scaling / (1 - p)

Memory bound: 2 M r FLOP per 2 M bytes of X at 16 bit. One program makes BLOCK_M rows and BLOCK_R columns; X is read
once per 64 ranks. The mask is drawn in registers; its bits are stored, 1/16 of a 16-bit X, if the backward reads
them instead of drawing again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.common import (
    Dropout,
    dropout_args,
    inv_keep,
    keep_bytes,
    precision_of,
    store_keep,
    unpack_keep,
)
from lora_kernels.kernels.launch import launch
from lora_kernels.kernels.tiles import ShrinkConfig, rank_tile
from lora_kernels.operands.dtypes import low_rank_dtype


@triton.jit
def _shrink_kernel(
    X_ptr,
    A_ptr,
    XA_ptr,
    seed_ptr,
    keep_ptr,
    M,
    K,
    r,
    stride_keep,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    stride_sm,
    factor,
    later_ranks,
    later_factors,
    threshold,
    DROPOUT: tl.constexpr,
    STORE_KEEP: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """XA = factor * (D*X) A^T for one block of rows and one block of ranks."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    mask_r = offs_r < r
    x_ptrs = X_ptr + offs_m[:, None].to(tl.int64) * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
    a_ptrs = A_ptr + offs_r[None, :].to(tl.int64) * stride_ar + offs_k[:, None].to(tl.int64) * stride_ak
    step_x = tl.cast(stride_xk, tl.int64) * BLOCK_K
    step_a = tl.cast(stride_ak, tl.int64) * BLOCK_K
    LOW: tl.constexpr = XA_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=mask_m[:, None], other=0.0)
            a = tl.load(a_ptrs, mask=mask_r[None, :], other=0.0)
        else:
            mask_k = offs_k < K - k * BLOCK_K
            x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            a = tl.load(a_ptrs, mask=mask_r[None, :] & mask_k[:, None], other=0.0)
        if DROPOUT:
            col = k * BLOCK_K
            packed = keep_bytes(seed_ptr, keep_ptr, stride_keep, offs_m, mask_m, col, K, threshold, BLOCK_K, DROPOUT)
            if STORE_KEEP:
                store_keep(packed, keep_ptr, stride_keep, offs_m, mask_m & (tl.program_id(1) == 0), col, K, BLOCK_K)
            x = tl.where(unpack_keep(packed), x, 0.0)
        acc = tl.dot(x.to(LOW), a.to(LOW), acc, input_precision=PRECISION)
        x_ptrs += step_x
        a_ptrs += step_a
    factors = tl.zeros((BLOCK_R,), tl.float32) + factor
    for p in tl.static_range(len(later_ranks)):
        factors = tl.where(offs_r >= later_ranks[p], later_factors[p], factors)
    s_ptrs = XA_ptr + offs_m[:, None].to(tl.int64) * stride_sm + offs_r[None, :]
    tl.store(s_ptrs, (acc * factors[None, :]).to(XA_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])


def shrink(
    X: Tensor,
    A: Tensor,
    scaling: float,
    drop: Dropout | None,
    config: ShrinkConfig,
    later: Sequence[tuple[int, float]] = (),
) -> Tensor:
    """XA (M, r) = scaling/(1-p) (D*X) A^T for X (M, K) and A (r, K) of any strides and float dtypes; M > 0.

    Fills ``drop.bits`` if they exist. ``later``: for an A that stacks projections with different scalings, (first rank,
    scaling) of those after the first, in order.
    """
    (M, K), r = X.shape, A.shape[0]
    XA = torch.empty(M, r, dtype=low_rank_dtype(X.dtype), device=X.device)
    BLOCK_R = rank_tile(r, X.dtype)
    launch(
        _shrink_kernel,
        (triton.cdiv(M, config.BLOCK_M), triton.cdiv(r, BLOCK_R)),
        X.device,
        X,
        A,
        XA,
        M=M,
        K=K,
        r=r,
        stride_xm=X.stride(0),
        stride_xk=X.stride(1),
        stride_ar=A.stride(0),
        stride_ak=A.stride(1),
        stride_sm=XA.stride(0),
        factor=scaling * inv_keep(drop),
        later_ranks=tuple(first for first, _ in later),
        later_factors=tuple(s * inv_keep(drop) for _, s in later),
        STORE_KEEP=drop is not None and drop.bits is not None,
        EVEN_K=K % config.BLOCK_K == 0,
        PRECISION=precision_of(X.dtype),
        BLOCK_M=config.BLOCK_M,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=BLOCK_R,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **dropout_args(drop, draw=True),
    )
    return XA
