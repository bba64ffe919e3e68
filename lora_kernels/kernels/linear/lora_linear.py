"""Forward of a LoRA linear layer with pointers: runs on every chip.

    XA = s/(1-p) (D*X) A^T,   Y = X W^T + bias + XA B^T         X (M,K)  W (N,K)  A (r,K)  B (N,r)  Y (M,N)

extend    Y from an XA that the shrink pass made: one GEMM whose accumulator starts at XA B^T and goes on over K
one_pass  XA as well, accumulated beside Y in the same K loop, in every column block again: one launch, X read once,
          r / BLOCK_N more matrix work; for few rows or narrow N

The low-rank term opens the accumulator instead of closing it: its operands are loaded before the software-pipelined
loop, so no register operand feeds a pipelined wgmma (ptxas 12.8 miscompiles that shape).
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
    keep_bytes,
    low_rank,
    precision_of,
    store_keep,
    tile_order,
    unpack_keep,
)
from lora_kernels.kernels.launch import launch
from lora_kernels.kernels.tiles import GemmConfig, rank_tile
from lora_kernels.operands.dtypes import low_rank_dtype


@triton.jit
def _extend_kernel(
    X_ptr,
    W_ptr,
    XA_ptr,
    B_ptr,
    bias_ptr,
    Y_ptr,
    M,
    N,
    K,
    r,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_sm,
    stride_bn,
    stride_br,
    stride_bias,
    stride_ym,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Y = X W^T + bias + XA B^T, one output tile a program."""
    pid_m, pid_n = tile_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    acc = low_rank(
        XA_ptr, B_ptr, offs_m, offs_n, mask_m, mask_n, r, stride_sm, 1, stride_bn, stride_br, BLOCK_M, BLOCK_N, BLOCK_R,
        PRECISION,
    )  # fmt: skip
    acc = accumulate(
        acc, X_ptr, W_ptr, offs_m, offs_n, mask_m, mask_n, K, stride_xm, stride_xk, stride_wn, stride_wk, BLOCK_K,
        EVEN_K, PRECISION,
    )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n.to(tl.int64) * stride_bias, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = Y_ptr + offs_m[:, None].to(tl.int64) * stride_ym + offs_n[None, :]
    tl.store(y_ptrs, acc.to(Y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _one_pass_kernel(
    X_ptr,
    W_ptr,
    A_ptr,
    B_ptr,
    bias_ptr,
    Y_ptr,
    XA_ptr,
    seed_ptr,
    keep_ptr,
    M,
    N,
    K,
    r,
    stride_keep,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    stride_bias,
    stride_ym,
    stride_sm,
    factor,
    threshold,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    STORE_KEEP: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Y = X W^T + bias + XA B^T, XA = factor (D*X) A^T made in the same K loop and stored by the first column block."""
    pid_m, pid_n = tile_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask_r = offs_r < r
    x_ptrs = X_ptr + offs_m[:, None].to(tl.int64) * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
    w_ptrs = W_ptr + offs_n[None, :].to(tl.int64) * stride_wn + offs_k[:, None].to(tl.int64) * stride_wk
    a_ptrs = A_ptr + offs_r[None, :].to(tl.int64) * stride_ar + offs_k[:, None].to(tl.int64) * stride_ak
    step_x = tl.cast(stride_xk, tl.int64) * BLOCK_K
    step_w = tl.cast(stride_wk, tl.int64) * BLOCK_K
    step_a = tl.cast(stride_ak, tl.int64) * BLOCK_K
    LOW: tl.constexpr = XA_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    xa = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=mask_m[:, None], other=0.0)
            w = tl.load(w_ptrs, mask=mask_n[None, :], other=0.0)
            a = tl.load(a_ptrs, mask=mask_r[None, :], other=0.0)
        else:
            mask_k = offs_k < K - k * BLOCK_K
            x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
            a = tl.load(a_ptrs, mask=mask_r[None, :] & mask_k[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        if DROPOUT:
            col = k * BLOCK_K
            packed = keep_bytes(seed_ptr, keep_ptr, stride_keep, offs_m, mask_m, col, K, threshold, BLOCK_K, DROPOUT)
            if STORE_KEEP:
                store_keep(packed, keep_ptr, stride_keep, offs_m, mask_m & (pid_n == 0), col, K, BLOCK_K)
            x = tl.where(unpack_keep(packed), x, 0.0)
        xa = tl.dot(x.to(LOW), a.to(LOW), xa, input_precision=PRECISION)
        x_ptrs += step_x
        w_ptrs += step_w
        a_ptrs += step_a
    xa = (xa * factor).to(LOW)
    if pid_n == 0:
        s_ptrs = XA_ptr + offs_m[:, None].to(tl.int64) * stride_sm + offs_r[None, :]
        tl.store(s_ptrs, xa, mask=mask_m[:, None] & mask_r[None, :])
    b_ptrs = B_ptr + offs_n[None, :].to(tl.int64) * stride_bn + offs_r[:, None].to(tl.int64) * stride_br
    b = tl.load(b_ptrs, mask=mask_n[None, :] & mask_r[:, None], other=0.0)
    acc = tl.dot(xa, b.to(xa.dtype), acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n.to(tl.int64) * stride_bias, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = Y_ptr + offs_m[:, None].to(tl.int64) * stride_ym + offs_n[None, :]
    tl.store(y_ptrs, acc.to(Y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def _grid(M: int, N: int, config: GemmConfig) -> tuple[int]:
    return (triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N),)


def extend(X: Tensor, W: Tensor, XA: Tensor, B: Tensor, bias: Tensor | None, config: GemmConfig) -> Tensor:
    """Y (M, N) = X W^T + bias + XA B^T for X (M, K), W (N, K), XA (M, r), B (N, r), bias (N,) or None; M > 0."""
    (M, K), (N, r) = X.shape, B.shape
    Y = torch.empty(M, N, dtype=X.dtype, device=X.device)
    launch(
        _extend_kernel,
        _grid(M, N, config),
        X.device,
        X,
        W,
        XA,
        B,
        bias,
        Y,
        M=M,
        N=N,
        K=K,
        r=r,
        stride_xm=X.stride(0),
        stride_xk=X.stride(1),
        stride_wn=W.stride(0),
        stride_wk=W.stride(1),
        stride_sm=XA.stride(0),
        stride_bn=B.stride(0),
        stride_br=B.stride(1),
        stride_bias=0 if bias is None else bias.stride(0),
        stride_ym=Y.stride(0),
        HAS_BIAS=bias is not None,
        EVEN_K=K % config.BLOCK_K == 0,
        PRECISION=precision_of(X.dtype),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=rank_tile(r, X.dtype),
        GROUP_M=config.GROUP_M,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return Y


def one_pass(
    X: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    scaling: float,
    drop: Dropout | None,
    config: GemmConfig,
) -> tuple[Tensor, Tensor]:
    """Y (M, N) and XA (M, r) in one launch; r at most rank_block, M > 0. Fills ``drop.bits`` where there are any."""
    (M, K), (N, r) = X.shape, B.shape
    Y = torch.empty(M, N, dtype=X.dtype, device=X.device)
    XA = torch.empty(M, r, dtype=low_rank_dtype(X.dtype), device=X.device)
    launch(
        _one_pass_kernel,
        _grid(M, N, config),
        X.device,
        X,
        W,
        A,
        B,
        bias,
        Y,
        XA,
        M=M,
        N=N,
        K=K,
        r=r,
        stride_xm=X.stride(0),
        stride_xk=X.stride(1),
        stride_wn=W.stride(0),
        stride_wk=W.stride(1),
        stride_ar=A.stride(0),
        stride_ak=A.stride(1),
        stride_bn=B.stride(0),
        stride_br=B.stride(1),
        stride_bias=0 if bias is None else bias.stride(0),
        stride_ym=Y.stride(0),
        stride_sm=XA.stride(0),
        factor=scaling * inv_keep(drop),
        HAS_BIAS=bias is not None,
        STORE_KEEP=drop is not None and drop.bits is not None,
        EVEN_K=K % config.BLOCK_K == 0,
        PRECISION=precision_of(X.dtype),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=rank_tile(r, X.dtype),
        GROUP_M=config.GROUP_M,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **dropout_args(drop, draw=True),
    )
    return Y, XA
