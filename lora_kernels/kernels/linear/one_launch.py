"""Forward of a LoRA linear layer in one launch, by pointers: persistent programs and cp.async, sm_80 and newer.

    XA = s (X A^T),   Y = X W^T + bias + XA B^T         X (M,K)  W (N,K)  A (r,K)  B (N,r)  Y (M,N)

The first programs make XA, one row block a task, and publish each block with a flag; every output tile runs its K loop
first and acquires the flag of its row block only then. The closing product is outside the pipelined loop, so that no
register operand feeds a pipelined wgmma (ptxas 12.8 miscompiles that shape); sm_80 to sm_89 use mma.sync.

Any strides, any sizes: every axis is masked. docs/one_launch.md has the tiles, what the compiler makes of them and what
was lost; docs/sm90_linear.md the protocol of the flags. Not measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from lora_kernels.kernels.common import accumulate, precision_of, tile_order
from lora_kernels.kernels.launch import launch
from lora_kernels.kernels.persistent import (
    add_low_rank,
    count_reader,
    first_tile,
    halves,
    one_launch_flags,
    one_launch_grid,
    publish,
    wait_for,
)
from lora_kernels.kernels.tiles import PtrConfig, rank_tile
from lora_kernels.operands.dtypes import low_rank_dtype


@triton.jit
def _make_xa(
    X_ptr,
    A_ptr,
    XA_ptr,
    offs_m,
    M,
    K,
    r,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    stride_sm,
    scaling,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """XA = scaling X A^T for the rows offs_m, written in XA's dtype."""
    offs_r = tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = (offs_m < M)[:, None]
    mask_r = (offs_r < r)[None, :]
    x_ptrs = X_ptr + offs_m[:, None].to(tl.int64) * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
    a_ptrs = A_ptr + offs_r[None, :].to(tl.int64) * stride_ar + offs_k[:, None].to(tl.int64) * stride_ak
    step_x = tl.cast(stride_xk, tl.int64) * BLOCK_K
    step_a = tl.cast(stride_ak, tl.int64) * BLOCK_K
    LOW: tl.constexpr = XA_ptr.dtype.element_ty
    xa = tl.zeros((offs_m.shape[0], BLOCK_R), tl.float32)
    for k in tl.range(0, tl.cdiv(K, BLOCK_K), num_stages=STAGES):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=mask_m, other=0.0)
            a = tl.load(a_ptrs, mask=mask_r, other=0.0)
        else:
            mask_k = offs_k < K - k * BLOCK_K
            x = tl.load(x_ptrs, mask=mask_m & mask_k[None, :], other=0.0)
            a = tl.load(a_ptrs, mask=mask_r & mask_k[:, None], other=0.0)
        xa = tl.dot(x.to(LOW), a.to(LOW), xa, input_precision=PRECISION)
        x_ptrs += step_x
        a_ptrs += step_a
    s_ptrs = XA_ptr + offs_m[:, None].to(tl.int64) * stride_sm + offs_r[None, :]
    tl.store(s_ptrs, (xa * scaling).to(LOW), mask=mask_m & mask_r)


@triton.jit
def _store_columns(
    tile, Y_ptr, bias_ptr, offs_m, col, M, N, stride_ym, stride_bias, HAS_BIAS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Y = tile + bias for the rows offs_m and COLUMNS columns from col on."""
    offs_n = col + tl.arange(0, COLUMNS)
    mask_n = offs_n < N
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n.to(tl.int64) * stride_bias, mask=mask_n, other=0.0)
        tile += bias.to(tl.float32)[None, :]
    y_ptrs = Y_ptr + offs_m[:, None].to(tl.int64) * stride_ym + offs_n[None, :]
    tl.store(y_ptrs, tile.to(Y_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["xa_programs"])
def _ptr_one_launch_kernel(
    X_ptr,
    W_ptr,
    A_ptr,
    B_ptr,
    bias_ptr,
    Y_ptr,
    XA_ptr,
    ready_ptr,
    readers_ptr,
    M,
    N,
    K,
    r,
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
    scaling,
    xa_programs,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    XA_STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEP: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """XA = scaling X A^T by the first xa_programs programs, then Y = X W^T + bias + XA B^T by all of them.

    A program makes all of its row blocks of XA before it waits on anything, and every program is resident.
    """
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    if pid < xa_programs:
        for block in tl.range(pid, num_m, xa_programs):
            _make_xa(
                X_ptr, A_ptr, XA_ptr, block * BLOCK_M + tl.arange(0, BLOCK_M), M, K, r, stride_xm, stride_xk, stride_ar,
                stride_ak, stride_sm, scaling, EVEN_K, PRECISION, BLOCK_K, BLOCK_R, XA_STAGES,
            )  # fmt: skip
            publish(ready_ptr, block)
    for tile in tl.range(first_tile(xa_programs), num_m * num_n, tl.num_programs(0)):
        pid_m, pid_n = tile_order(tile, num_m, num_n, GROUP_M)
        col = pid_n * BLOCK_N
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = col + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = accumulate(
            acc, X_ptr, W_ptr, offs_m, offs_n, offs_m < M, offs_n < N, K, stride_xm, stride_xk, stride_wn, stride_wk,
            BLOCK_K, EVEN_K, PRECISION,
        )  # fmt: skip
        wait_for(ready_ptr, pid_m)
        acc = add_low_rank(
            acc, XA_ptr, B_ptr, offs_m, offs_n, M, N, r, stride_sm, stride_bn, stride_br, BLOCK_R, RANK_STEP, PRECISION
        )
        count_reader(ready_ptr, readers_ptr, pid_m, num_n)
        left, right = halves(acc)
        HALF: tl.constexpr = BLOCK_N // 2
        _store_columns(left, Y_ptr, bias_ptr, offs_m, col, M, N, stride_ym, stride_bias, HAS_BIAS, HALF)
        _store_columns(right, Y_ptr, bias_ptr, offs_m, col + HALF, M, N, stride_ym, stride_bias, HAS_BIAS, HALF)


def ptr_one_launch(
    X: Tensor, W: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, scaling: float, config: PtrConfig, units: int
) -> tuple[Tensor, Tensor]:
    """Y (M, N) and XA (M, r) in one launch without dropout; X (M, K), W (N, K), A, B, bias of any strides.

    M > 0, r at most one rank tile; A and B of any float dtype. ``units``: the multiprocessors, of which each holds one
    program; the launch is cooperative, so that all programs are resident or none starts. Under the interpreter, which
    runs programs one after another, one program makes XA.
    """
    (M, K), (N, r) = X.shape, B.shape
    Y = torch.empty(M, N, dtype=X.dtype, device=X.device)
    XA = torch.empty(M, r, dtype=low_rank_dtype(X.dtype), device=X.device)
    num_m, num_n = triton.cdiv(M, config.BLOCK_M), triton.cdiv(N, config.BLOCK_N)
    programs, xa_programs = one_launch_grid(num_m, num_n, units)
    ready, readers = one_launch_flags(num_m, X.device)
    launch(
        _ptr_one_launch_kernel,
        (programs,),
        X.device,
        X,
        W,
        A,
        B,
        bias,
        Y,
        XA,
        ready,
        readers,
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
        scaling=scaling,
        xa_programs=1 if knobs.runtime.interpret else xa_programs,
        HAS_BIAS=bias is not None,
        EVEN_K=K % config.BLOCK_K == 0,
        PRECISION=precision_of(X.dtype),
        XA_STAGES=config.XA_STAGES,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=rank_tile(r, X.dtype),
        RANK_STEP=config.RANK_STEP,
        GROUP_M=config.GROUP_M,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        cooperative=True,
    )
    return Y, XA
