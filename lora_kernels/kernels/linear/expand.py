"""dX += factor D*(dYB A): adds the low-rank term to a base product of the vendor's library.

dX (M, K), dYB (M, r), A (r, K);  D = dropout's keep mask, factor = 1 / (1 - p)

For cases that the library's addmm does not support: a mask, or a float32 dYB with a float16 dX. Y += XA B^T likewise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.chip import Chip
from lora_kernels.kernels.common import Dropout, dropout_args, inv_keep, keep_tile, low_rank, precision_of
from lora_kernels.kernels.launch import launch
from lora_kernels.kernels.tiles import GemmConfig, expand_config, rank_tile, wide_loads
from lora_kernels.operands.dtypes import low_rank_dtype


@triton.jit
def _expand_kernel(
    dX_ptr,
    dYB_ptr,
    A_ptr,
    seed_ptr,
    keep_ptr,
    M,
    K,
    r,
    stride_keep,
    stride_dxm,
    stride_sm,
    stride_ar,
    stride_ak,
    factor,
    threshold,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dX += factor D*(dYB A) for one tile of dX."""
    col = tl.program_id(1) * BLOCK_K
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = col + tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    mask_k = offs_k < K
    term = low_rank(
        dYB_ptr, A_ptr, offs_m, offs_k, mask_m, mask_k, r, stride_sm, 1, stride_ak, stride_ar, BLOCK_M, BLOCK_K,
        BLOCK_R, PRECISION,
    )  # fmt: skip
    if DROPOUT:
        keep = keep_tile(seed_ptr, keep_ptr, stride_keep, offs_m, mask_m, col, K, threshold, BLOCK_K, DROPOUT)
        term = tl.where(keep, term * factor, 0.0)
    dx_ptrs = dX_ptr + offs_m[:, None].to(tl.int64) * stride_dxm + offs_k[None, :]
    mask = mask_m[:, None] & mask_k[None, :]
    dx = tl.load(dx_ptrs, mask=mask, other=0.0).to(tl.float32) + term
    tl.store(dx_ptrs, dx.to(dX_ptr.dtype.element_ty), mask=mask)


def expand_add_(dX: Tensor, dYB: Tensor, A: Tensor, drop: Dropout | None, config: GemmConfig) -> Tensor:
    """dX (M, K) += D/(1-p) * (dYB A) in place, for a dX that the caller has just computed; one launch, M > 0.

    dYB and dX have contiguous rows; A has any strides.
    """
    (M, K), r = dX.shape, A.shape[0]
    launch(
        _expand_kernel,
        (triton.cdiv(M, config.BLOCK_M), triton.cdiv(K, config.BLOCK_N)),
        dX.device,
        dX,
        dYB,
        A,
        M=M,
        K=K,
        r=r,
        stride_dxm=dX.stride(0),
        stride_sm=dYB.stride(0),
        stride_ar=A.stride(0),
        stride_ak=A.stride(1),
        factor=inv_keep(drop),
        PRECISION=precision_of(dX.dtype),
        BLOCK_M=config.BLOCK_M,
        BLOCK_K=config.BLOCK_N,
        BLOCK_R=rank_tile(r, dX.dtype),
        num_warps=config.num_warps,
        num_stages=1,
        **dropout_args(drop),
    )
    return dX


def add_update_(Y: Tensor, XA: Tensor, B: Tensor, chip: Chip) -> Tensor:
    """Y (M, N) += XA B^T in place, for the caller's own Y, XA (M, r) and B (N, r); one launch, M > 0."""
    return expand_add_(Y, XA, B.t(), None, expand_config(Y.shape[0], Y.shape[1], Y.dtype, chip, wide_loads(Y)))


def library_low_rank(dtype: torch.dtype, drop: Dropout | None) -> bool:
    """Whether the vendor's library can make a layer's products of rank r: no mask, and all operands in X's dtype."""
    return drop is None and low_rank_dtype(dtype) is dtype
