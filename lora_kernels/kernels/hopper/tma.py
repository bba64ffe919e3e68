"""Forward of a LoRA linear layer with TMA descriptors: persistent programs on sm_90 and newer.

    XA = s (X A^T),   Y = X W^T + bias + XA B^T         X (M,K)  W (N,K)  A (r,K)  B (N,r)  Y (M,N)

tma_extend  Y from an XA that the shrink pass made: one GEMM whose accumulator is closed by XA B^T.
one_launch  XA as well: the first programs make it, one row block a task, and publish each block with a flag; every
            output tile runs its K loop first and acquires the flag of its row block only then.

X, W and Y go through descriptors, which zero-fill past the end and cut what is written. A, B, XA and bias are small and
go through pointers: any strides, any float dtype, ranks masked and never padded in memory. docs/sm90_linear.md has the
design, the protocol of the flags and what the compiler makes of it. Not measured on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.errors import BackendUnavailableError
from lora_kernels.kernels.common import tile_order
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
from lora_kernels.kernels.tiles import TmaConfig, rank_tile


@triton.jit
def _accumulate(acc, X_desc, W_desc, row, col, K, BLOCK_K: tl.constexpr):
    """acc + X W^T over the whole of K for the rows from ``row`` and the columns from ``col`` on."""
    for k in tl.range(0, tl.cdiv(K, BLOCK_K)):
        x = X_desc.load([row, k * BLOCK_K])
        w = W_desc.load([col, k * BLOCK_K])
        acc = tl.dot(x, w.T, acc)
    return acc


@triton.jit
def _finish(
    acc,
    Y_desc,
    bias_ptr,
    row,
    col,
    N,
    stride_bias,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Y = acc + bias, written in two halves of the columns: half the shared memory of a whole tile."""
    if HAS_BIAS:
        offs_n = col + tl.arange(0, BLOCK_N)
        bias = tl.load(bias_ptr + offs_n.to(tl.int64) * stride_bias, mask=offs_n < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    left, right = halves(acc)
    Y_desc.store([row, col], left.to(Y_desc.dtype))
    Y_desc.store([row, col + BLOCK_N // 2], right.to(Y_desc.dtype))


@triton.jit
def _tma_extend_kernel(
    X_desc,
    W_desc,
    Y_desc,
    XA_ptr,
    B_ptr,
    bias_ptr,
    M,
    N,
    K,
    r,
    stride_sm,
    stride_bn,
    stride_br,
    stride_bias,
    HAS_BIAS: tl.constexpr,
    FLATTEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEP: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Y = X W^T + bias + XA B^T, output tiles dealt out to resident programs."""
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=FLATTEN):
        pid_m, pid_n = tile_order(tile, num_m, num_n, GROUP_M)
        row = pid_m * BLOCK_M
        col = pid_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = _accumulate(acc, X_desc, W_desc, row, col, K, BLOCK_K)
        acc = add_low_rank(
            acc, XA_ptr, B_ptr, row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N), M, N, r, stride_sm, stride_bn,
            stride_br, BLOCK_R, RANK_STEP, "ieee",
        )  # fmt: skip
        _finish(acc, Y_desc, bias_ptr, row, col, N, stride_bias, HAS_BIAS, BLOCK_N)


@triton.jit(do_not_specialize=["xa_programs"])
def _one_launch_kernel(
    X_desc,
    W_desc,
    Y_desc,
    A_ptr,
    B_ptr,
    bias_ptr,
    XA_ptr,
    ready_ptr,
    readers_ptr,
    M,
    N,
    K,
    r,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    stride_bias,
    stride_sm,
    scaling,
    xa_programs,
    HAS_BIAS: tl.constexpr,
    XA_STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEP: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """XA = scaling X A^T by the first xa_programs programs, then Y = X W^T + bias + XA B^T by all of them.

    A program makes all of its row blocks of XA before it waits on anything, and every program is resident: no wait is
    for ever. ready (num_m,) is 1 from a block's release until its last of num_n readers puts it, and its count of
    readers, back to 0: every launch finds zeros and leaves zeros.
    """
    pid = tl.program_id(0)
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    num_k = tl.cdiv(K, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    if pid < xa_programs:
        a_rows = A_ptr + offs_r[:, None].to(tl.int64) * stride_ar
        for block in tl.range(pid, num_m, xa_programs):
            xa = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for k in tl.range(0, num_k, num_stages=XA_STAGES):
                x = X_desc.load([block * BLOCK_M, k * BLOCK_K])
                offs_k = k * BLOCK_K + tl.arange(0, BLOCK_K)
                mask = (offs_r < r)[:, None] & (offs_k < K)[None, :]
                a = tl.load(a_rows + offs_k[None, :].to(tl.int64) * stride_ak, mask=mask, other=0.0)
                xa = tl.dot(x, a.to(x.dtype).T, xa)
            offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
            s_ptrs = XA_ptr + offs_m[:, None].to(tl.int64) * stride_sm + offs_r[None, :]
            mask = (offs_m < M)[:, None] & (offs_r < r)[None, :]
            tl.store(s_ptrs, (xa * scaling).to(XA_ptr.dtype.element_ty), mask=mask)
            publish(ready_ptr, block)
    for tile in tl.range(first_tile(xa_programs), num_m * num_n, tl.num_programs(0)):
        pid_m, pid_n = tile_order(tile, num_m, num_n, GROUP_M)
        row = pid_m * BLOCK_M
        col = pid_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = _accumulate(acc, X_desc, W_desc, row, col, K, BLOCK_K)
        wait_for(ready_ptr, pid_m)
        acc = add_low_rank(
            acc, XA_ptr, B_ptr, row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N), M, N, r, stride_sm, stride_bn,
            stride_br, BLOCK_R, RANK_STEP, "ieee",
        )  # fmt: skip
        count_reader(ready_ptr, readers_ptr, pid_m, num_n)
        _finish(acc, Y_desc, bias_ptr, row, col, N, stride_bias, HAS_BIAS, BLOCK_N)


def descriptor_refusal(**tensors: Tensor) -> str | None:
    """None where descriptors can take these matrices; otherwise which one they cannot, and why."""
    for name, t in tensors.items():
        if t.stride(1) != 1 and t.shape[1] > 1:
            return f"{name} has stride {t.stride(1)} along its rows, a descriptor needs 1"
        if t.shape[0] > 1 and t.stride(0) * t.element_size() % 16:
            return f"{name} has rows {t.stride(0) * t.element_size()} bytes apart, a descriptor needs a multiple of 16"
        if t.data_ptr() % 16:
            return f"{name} starts at an address that is not a multiple of 16"
    return None


def descriptor(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Descriptor of a matrix in boxes of rows x columns; the stride of a lone row is never used, but checked."""
    stride = t.stride(0) if t.shape[0] > 1 else -(-t.shape[1] // 8) * 8
    return TensorDescriptor(t, list(t.shape), [stride, 1], [rows, columns])


def _prepare(X: Tensor, W: Tensor, config: TmaConfig) -> tuple[Tensor, dict[str, Any]]:
    """Y, uninitialised, and the arguments that both kernels share."""
    Y = torch.empty(X.shape[0], W.shape[0], dtype=X.dtype, device=X.device)
    if reason := descriptor_refusal(X=X, W=W, Y=Y):
        raise BackendUnavailableError(f"TMA kernels cannot take this call: {reason}; copy it or name no plan")
    return Y, {
        "X_desc": descriptor(X, config.BLOCK_M, config.BLOCK_K),
        "W_desc": descriptor(W, config.BLOCK_N, config.BLOCK_K),
        "Y_desc": descriptor(Y, config.BLOCK_M, config.BLOCK_N // 2),
        "M": X.shape[0],
        "N": W.shape[0],
        "K": X.shape[1],
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_K": config.BLOCK_K,
        "RANK_STEP": config.RANK_STEP,
        "GROUP_M": config.GROUP_M,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def tma_extend(
    X: Tensor, W: Tensor, XA: Tensor, B: Tensor, bias: Tensor | None, config: TmaConfig, units: int
) -> Tensor:
    """Y (M, N) = X W^T + bias + XA B^T in one launch of at most ``units`` programs; M > 0, r at most one rank tile.

    Raises:
        BackendUnavailableError: descriptors cannot take X or W, or rows of Y.
    """
    Y, shared = _prepare(X, W, config)
    tiles = triton.cdiv(X.shape[0], config.BLOCK_M) * triton.cdiv(W.shape[0], config.BLOCK_N)
    launch(
        _tma_extend_kernel,
        (min(units, tiles),),
        X.device,
        XA_ptr=XA,
        B_ptr=B,
        bias_ptr=bias,
        r=B.shape[1],
        stride_sm=XA.stride(0),
        stride_bn=B.stride(0),
        stride_br=B.stride(1),
        stride_bias=0 if bias is None else bias.stride(0),
        HAS_BIAS=bias is not None,
        FLATTEN=config.FLATTEN,
        BLOCK_R=rank_tile(B.shape[1], X.dtype),
        **shared,
    )
    return Y


def one_launch(
    X: Tensor, W: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, scaling: float, config: TmaConfig, units: int
) -> tuple[Tensor, Tensor]:
    """Y (M, N) and XA (M, r) in one launch without dropout; M > 0, r at most one rank tile.

    ``units``: the multiprocessors, of which each holds one program; the launch is cooperative, so that all programs
    are resident or none starts. Under the interpreter, which runs programs one after another, one program makes XA.

    Raises:
        BackendUnavailableError: descriptors cannot take X or W, or rows of Y.
    """
    Y, shared = _prepare(X, W, config)
    XA = torch.empty(X.shape[0], A.shape[0], dtype=X.dtype, device=X.device)
    num_m, num_n = triton.cdiv(X.shape[0], config.BLOCK_M), triton.cdiv(W.shape[0], config.BLOCK_N)
    programs, xa_programs = one_launch_grid(num_m, num_n, units)
    ready, readers = one_launch_flags(num_m, X.device)
    launch(
        _one_launch_kernel,
        (programs,),
        X.device,
        A_ptr=A,
        B_ptr=B,
        bias_ptr=bias,
        XA_ptr=XA,
        ready_ptr=ready,
        readers_ptr=readers,
        r=A.shape[0],
        stride_ar=A.stride(0),
        stride_ak=A.stride(1),
        stride_bn=B.stride(0),
        stride_br=B.stride(1),
        stride_bias=0 if bias is None else bias.stride(0),
        stride_sm=XA.stride(0),
        scaling=scaling,
        xa_programs=1 if knobs.runtime.interpret else xa_programs,
        HAS_BIAS=bias is not None,
        XA_STAGES=config.XA_STAGES,
        BLOCK_R=rank_tile(A.shape[0], X.dtype),
        cooperative=True,
        **shared,
    )
    return Y, XA
