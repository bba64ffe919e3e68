"""Forward of a LoRA linear layer for Hopper, warp-specialised: a producer warp fills a ring, consumer warps multiply.

    XA = s (X A^T),   Y = X W^T + bias + XA B^T         X (M,K)  W (N,K)  A (r,K)  B (N,r)  Y (M,N)

gluon_extend      Y from an XA that the shrink pass made.
gluon_one_launch  XA as well: made by the programs that wave quantisation leaves idle, published by flags.

The low-rank term is one more step of the K loop: its operands arrive through the same ring, so nothing waits for them.
A slot of the ring is `full` when the bytes it expects have landed, `empty` when the products that read it are done.
docs/sm90_gluon.md has the protocol, what checks it and what the compiler makes of it. Not measured on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)

from lora_kernels.kernels.hopper.gluon_ring import (
    accumulate,
    block_barrier,
    box,
    check_descriptors,
    claim,
    close,
    fill,
    fill_tile,
    finish,
    low_rank_operand,
    make_ring,
    settle,
    tile_order,
    tma_load,
    view,
)
from lora_kernels.kernels.hopper.gluon_tiles import GluonConfig
from lora_kernels.kernels.launch import launch
from lora_kernels.kernels.persistent import one_launch_flags, one_launch_grid
from lora_kernels.kernels.tiles import rank_tile


@gluon.jit
def _extend_producer(
    X_desc, W_desc, XA_desc, B_desc, xs, ws, full, empty, num_m, num_n, num_k, HAS_RANKS: gl.constexpr,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """Fills the ring for every tile of this program: K in steps, then XA and B."""
    step = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        pid_m, pid_n = tile_order(tile, num_m, num_n, GROUP_M)
        row = pid_m * X_desc.block_type.shape[0]
        col = pid_n * W_desc.block_type.shape[0]
        step = fill_tile(X_desc, W_desc, row, col, num_k, xs, ws, full, empty, step, True, STAGES)
        if HAS_RANKS:
            step = fill(XA_desc, B_desc, row, 0, col, 0, xs, ws, full, empty, step, STAGES)


@gluon.jit
def _extend_consumer(
    bias_ptr, stride_bias, Y_desc, W_desc, XA_desc, B_desc, xs, ws, out, full, empty, num_m, num_n, num_k, N,
    HAS_BIAS: gl.constexpr, HAS_RANKS: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Y = X W^T + bias + XA B^T for every tile of this program."""
    BLOCK_M: gl.constexpr = xs.shape[1]
    BLOCK_N: gl.constexpr = ws.shape[1]
    tiles: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_N, 16])
    step = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        pid_m, pid_n = tile_order(tile, num_m, num_n, GROUP_M)
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, tiles)
        acc, step = accumulate(acc, W_desc, xs, ws, full, empty, num_k, step, True, STAGES)
        if HAS_RANKS:
            acc, step = close(acc, XA_desc, B_desc, xs, ws, full, empty, step, STAGES)
        else:
            acc = settle(acc, empty, step, STAGES)
        finish(acc, bias_ptr, stride_bias, N, Y_desc, out, pid_m * BLOCK_M, pid_n * BLOCK_N, HAS_BIAS)
    tma.store_wait(0)


@gluon.jit
def _gluon_extend_kernel(
    X_desc,
    W_desc,
    XA_desc,
    B_desc,
    Y_desc,
    bias_ptr,
    M,
    N,
    K,
    stride_bias,
    HAS_BIAS: gl.constexpr,
    HAS_RANKS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Y = X W^T + bias + XA B^T, output tiles dealt out to resident programs."""
    xs, ws, full, empty = make_ring(X_desc, W_desc, STAGES)
    out = gl.allocate_shared_memory(Y_desc.dtype, Y_desc.block_type.shape, Y_desc.layout)
    num_m = gl.cdiv(M, X_desc.block_type.shape[0])
    num_n = gl.cdiv(N, W_desc.block_type.shape[0])
    num_k = gl.cdiv(K, X_desc.block_type.shape[1])
    gl.warp_specialize(
        [
            (
                _extend_consumer,
                (
                    bias_ptr, stride_bias, Y_desc, W_desc, XA_desc, B_desc, xs, ws, out, full, empty, num_m, num_n,
                    num_k, N, HAS_BIAS, HAS_RANKS, STAGES, GROUP_M, num_warps,
                ),
            ),
            (
                _extend_producer,
                (
                    X_desc, W_desc, XA_desc, B_desc, xs, ws, full, empty, num_m, num_n, num_k, HAS_RANKS, STAGES,
                    GROUP_M,
                ),
            ),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )  # fmt: skip


def _prepare(X: Tensor, W: Tensor, bias: Tensor | None, config: GluonConfig) -> tuple[Tensor, dict[str, Any]]:
    """Y, uninitialised, and the arguments that both kernels share."""
    Y = torch.empty(X.shape[0], W.shape[0], dtype=X.dtype, device=X.device)
    check_descriptors(X=X, W=W, Y=Y)
    return Y, {
        "X_desc": box(X, config.BLOCK_M, config.BLOCK_K),
        "W_desc": box(W, config.BLOCK_N, config.BLOCK_K),
        "Y_desc": box(Y, config.BLOCK_M, config.BLOCK_N // 2),
        "bias_ptr": bias,
        "M": X.shape[0],
        "N": W.shape[0],
        "K": X.shape[1],
        "stride_bias": 0 if bias is None else bias.stride(0),
        "HAS_BIAS": bias is not None,
        "PRODUCER_REGISTERS": config.PRODUCER_REGISTERS,
        "STAGES": config.STAGES,
        "GROUP_M": config.GROUP_M,
        "num_warps": config.num_warps,
    }


def gluon_extend(
    X: Tensor, W: Tensor, XA: Tensor, B: Tensor, bias: Tensor | None, config: GluonConfig, units: int
) -> Tensor:
    """Y (M, N) = X W^T + bias + XA B^T in one launch of at most ``units`` programs; M > 0, r at most MOST_RANKS.

    r = 0 is the plain product, which benchmarks hold against the library's.

    Raises:
        BackendUnavailableError: descriptors cannot take X or W, or rows of Y.
    """
    Y, shared = _prepare(X, W, bias, config)
    r = B.shape[1]
    R = rank_tile(r, X.dtype) if r else 16  # without ranks the plain product: no box of them is ever read
    tiles = triton.cdiv(X.shape[0], config.BLOCK_M) * triton.cdiv(W.shape[0], config.BLOCK_N)
    launch(
        _gluon_extend_kernel,
        (min(units, tiles),),
        X.device,
        XA_desc=box(low_rank_operand(XA, X.dtype) if r else X, config.BLOCK_M, R),
        B_desc=box(low_rank_operand(B, X.dtype) if r else W, config.BLOCK_N, R),
        HAS_RANKS=r > 0,
        **shared,
    )
    return Y


@gluon.jit
def _one_launch_producer(
    X_desc, W_desc, A_desc, XA_desc, B_desc, kept_ptr, ready_ptr, readers_ptr, xs, ws, full, empty, num_m, num_n, num_k,
    xa_programs, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """Fills the ring: X and A for this program's row blocks of XA, then every tile's K loop, its XA and its B.

    XA comes from other programs' ordinary stores, which copies do not see: this warp acquires the row block's flag
    and copies XA through its registers. Up to STAGES steps are queued meanwhile, so nobody waits for it.
    """
    BLOCK_M: gl.constexpr = X_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = X_desc.block_type.shape[1]
    BLOCK_R: gl.constexpr = XA_desc.block_type.shape[1]
    ROWS: gl.constexpr = 1024 // BLOCK_R if 1024 // BLOCK_R < BLOCK_M else BLOCK_M  # at a time: 16 registers
    lanes: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_R, BLOCK_R // 8], [1, 1], [1, 0])
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    step = 0
    if pid < xa_programs:
        for block in range(pid, num_m, xa_programs):
            for k in range(num_k):
                step = fill(
                    X_desc, A_desc, block * BLOCK_M, k * BLOCK_K, 0, k * BLOCK_K, xs, ws, full, empty, step, STAGES
                )
    offs_m = gl.arange(0, ROWS, gl.SliceLayout(1, lanes))
    offs_r = gl.arange(0, BLOCK_R, gl.SliceLayout(0, lanes))
    for tile in range((pid + programs - xa_programs) % programs, num_m * num_n, programs):
        pid_m, pid_n = tile_order(tile, num_m, num_n, GROUP_M)
        row = pid_m * BLOCK_M
        col = pid_n * W_desc.block_type.shape[0]
        step = fill_tile(X_desc, W_desc, row, col, num_k, xs, ws, full, empty, step, True, STAGES)
        slot = claim(empty, step, STAGES)
        tma_load(B_desc, [col, 0], full.index(slot), view(ws.index(slot), B_desc))
        while gl.atomic_add(ready_ptr + pid_m, 0, sem="acquire") == 0:
            pass
        xa = view(xs.index(slot), XA_desc)
        for m in gl.static_range(0, BLOCK_M, ROWS):
            s_ptrs = kept_ptr + (row + m + offs_m)[:, None].to(gl.int64) * BLOCK_R + offs_r[None, :]
            xa.slice(m, ROWS, 0).store(gl.load(s_ptrs))
        fence_async_shared()
        block_barrier()  # every lane's part is there before one lane arrives
        mbarrier.expect(full.index(slot), B_desc.block_type.nbytes)
        step += 1
        if gl.atomic_add(readers_ptr + pid_m, 1, sem="acq_rel") == num_n - 1:
            gl.atomic_xchg(readers_ptr + pid_m, 0, sem="relaxed")
            gl.atomic_xchg(ready_ptr + pid_m, 0, sem="relaxed")


@gluon.jit
def _one_launch_consumer(
    bias_ptr, stride_bias, Y_desc, W_desc, A_desc, XA_desc, B_desc, XA_ptr, kept_ptr, ready_ptr, xs, ws, out, full,
    empty, num_m, num_n, num_k, M, N, r, stride_sm, scaling, xa_programs, HAS_BIAS: gl.constexpr,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """XA = scaling X A^T for this program's row blocks, each published; then Y for every tile of it."""
    BLOCK_M: gl.constexpr = xs.shape[1]
    BLOCK_N: gl.constexpr = ws.shape[1]
    BLOCK_R: gl.constexpr = A_desc.block_type.shape[0]
    ranks: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_R, 16])
    tiles: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_N, 16])
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    step = 0
    if pid < xa_programs:
        offs_r = gl.arange(0, BLOCK_R, gl.SliceLayout(0, ranks))[None, :]
        for block in range(pid, num_m, xa_programs):
            acc = gl.zeros((BLOCK_M, BLOCK_R), gl.float32, ranks)
            acc, step = accumulate(acc, A_desc, xs, ws, full, empty, num_k, step, True, STAGES)
            xa = (settle(acc, empty, step, STAGES) * scaling).to(XA_ptr.dtype.element_ty)
            offs_m = block * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, ranks))
            rows = offs_m[:, None].to(gl.int64)
            gl.store(XA_ptr + rows * stride_sm + offs_r, xa, mask=(offs_m < M)[:, None] & (offs_r < r))
            gl.store(kept_ptr + rows * BLOCK_R + offs_r, xa)
            block_barrier()  # every thread's part of the block is written before one thread releases it
            gl.atomic_xchg(ready_ptr + block, 1, sem="release")
    for tile in range((pid + programs - xa_programs) % programs, num_m * num_n, programs):
        pid_m, pid_n = tile_order(tile, num_m, num_n, GROUP_M)
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, tiles)
        acc, step = accumulate(acc, W_desc, xs, ws, full, empty, num_k, step, True, STAGES)
        acc, step = close(acc, XA_desc, B_desc, xs, ws, full, empty, step, STAGES)
        finish(acc, bias_ptr, stride_bias, N, Y_desc, out, pid_m * BLOCK_M, pid_n * BLOCK_N, HAS_BIAS)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["xa_programs"])
def _gluon_one_launch_kernel(
    X_desc,
    W_desc,
    A_desc,
    XA_desc,
    B_desc,
    Y_desc,
    bias_ptr,
    XA_ptr,
    kept_ptr,
    ready_ptr,
    readers_ptr,
    M,
    N,
    K,
    r,
    stride_bias,
    stride_sm,
    scaling,
    xa_programs,
    HAS_BIAS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    num_warps: gl.constexpr,
):
    """XA = scaling X A^T by the first xa_programs programs, then Y = X W^T + bias + XA B^T by all of them.

    A program makes all of its row blocks of XA before it waits on any flag, and every program is resident: no wait is
    for ever. ready (num_m,) is 1 from a block's release until the last of its num_n readers puts it, and its count of
    readers, back to 0: every launch finds zeros and leaves zeros.
    """
    xs, ws, full, empty = make_ring(X_desc, W_desc, STAGES)
    out = gl.allocate_shared_memory(Y_desc.dtype, Y_desc.block_type.shape, Y_desc.layout)
    num_m = gl.cdiv(M, X_desc.block_type.shape[0])
    num_n = gl.cdiv(N, W_desc.block_type.shape[0])
    num_k = gl.cdiv(K, X_desc.block_type.shape[1])
    gl.warp_specialize(
        [
            (
                _one_launch_consumer,
                (
                    bias_ptr, stride_bias, Y_desc, W_desc, A_desc, XA_desc, B_desc, XA_ptr, kept_ptr, ready_ptr, xs, ws,
                    out, full, empty, num_m, num_n, num_k, M, N, r, stride_sm, scaling, xa_programs, HAS_BIAS, STAGES,
                    GROUP_M, num_warps,
                ),
            ),
            (
                _one_launch_producer,
                (
                    X_desc, W_desc, A_desc, XA_desc, B_desc, kept_ptr, ready_ptr, readers_ptr, xs, ws, full, empty,
                    num_m, num_n, num_k, xa_programs, STAGES, GROUP_M,
                ),
            ),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )  # fmt: skip


def gluon_one_launch(
    X: Tensor, W: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, scaling: float, config: GluonConfig, units: int
) -> tuple[Tensor, Tensor]:
    """Y (M, N) and XA (M, r) in one launch without dropout; M > 0, r at most MOST_RANKS.

    ``units``: the multiprocessors, of which each holds one program; the launch is cooperative, so that all programs
    are resident or none starts. The programs hand XA on in whole tiles: rows and ranks padded, read 16 bytes at a time.

    Raises:
        BackendUnavailableError: descriptors cannot take X or W, or rows of Y.
    """
    Y, shared = _prepare(X, W, bias, config)
    M, r, R = X.shape[0], A.shape[0], rank_tile(A.shape[0], X.dtype)
    num_m, num_n = triton.cdiv(M, config.BLOCK_M), triton.cdiv(W.shape[0], config.BLOCK_N)
    XA = torch.empty(M, r, dtype=X.dtype, device=X.device)
    kept = torch.empty(num_m * config.BLOCK_M, R, dtype=X.dtype, device=X.device)
    programs, xa_programs = one_launch_grid(num_m, num_n, units)
    ready, readers = one_launch_flags(num_m, X.device)
    launch(
        _gluon_one_launch_kernel,
        (programs,),
        X.device,
        A_desc=box(low_rank_operand(A, X.dtype), R, config.BLOCK_K),
        XA_desc=box(kept, config.BLOCK_M, R),
        B_desc=box(low_rank_operand(B, X.dtype), config.BLOCK_N, R),
        XA_ptr=XA,
        kept_ptr=kept,
        ready_ptr=ready,
        readers_ptr=readers,
        r=r,
        stride_sm=XA.stride(0),
        scaling=scaling,
        xa_programs=xa_programs,
        cooperative=True,
        **shared,
    )
    return Y, XA
