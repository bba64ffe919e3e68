"""dX and dA of a LoRA linear layer for Hopper, warp-specialised.

    dX = dY W + D/(1-p) * (dYB A) (M, K)          dA = dYB^T (D*X) / (1-p) (r, K)

Every tile of dX takes its steps from one ring: dYB and A first, masked in registers while they are all that the
accumulator holds; then dY and W over the whole of N; then, with dX on its way out, the tile's rows of X beside those of
dYB, for this row block's part of dA. X goes through the ring like everything else: nothing waits for it, and nothing
but the masks is read through pointers. Partials of dA are summed in a fixed order. Not measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lora_kernels.errors import BackendUnavailableError
from lora_kernels.kernels.common import Dropout, inv_keep
from lora_kernels.kernels.hopper.gluon_ring import (
    accumulate,
    await_full,
    block_barrier,
    box,
    check_descriptors,
    fill,
    fill_tile,
    finish,
    low_rank_operand,
    make_ring,
    settle,
    tile_order,
    view,
)
from lora_kernels.kernels.hopper.gluon_tiles import GluonConfig
from lora_kernels.kernels.launch import launch
from lora_kernels.kernels.reduce import Partial, reduce_partials
from lora_kernels.kernels.tiles import rank_tile


@gluon.jit
def _keep_words(
    keep_ptr, stride_keep, row, col, M, ROWS: gl.constexpr, COLUMNS: gl.constexpr, cube: gl.constexpr
):  # fmt: skip
    """Keep bits of ROWS x COLUMNS elements, 32 columns a word; ``cube`` is their layout as (.., .., 32)."""
    offs_m = row + gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, cube)))
    offs_w = col // 32 + gl.arange(0, COLUMNS // 32, gl.SliceLayout(0, gl.SliceLayout(2, cube)))
    keep_ptrs = keep_ptr + offs_m[:, None].to(gl.int64) * stride_keep + offs_w[None, :]
    return gl.load(keep_ptrs, mask=(offs_m < M)[:, None] & (offs_w < stride_keep)[None, :], other=0)


@gluon.jit
def _masked(x, words, cube: gl.constexpr):
    """x where its bit is set, 0 elsewhere."""
    ROWS: gl.constexpr = x.shape[0]
    COLUMNS: gl.constexpr = x.shape[1]
    bit = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, cube)))
    keep = (words[:, :, None] >> bit[None, None, :]) & 1
    kept = gl.where(keep != 0, x.reshape((ROWS, COLUMNS // 32, 32)), 0.0)
    return gl.convert_layout(kept.reshape((ROWS, COLUMNS)), x.type.layout, assert_trivial=True)


@gluon.jit
def _dx_producer(
    dY_desc, W_desc, dYB_desc, A_desc, X_desc, rows_desc, ps, ws, full, empty, num_m, num_k, num_n,
    HAS_RANKS: gl.constexpr, MAKE_DA: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """Fills the ring for every tile of this program: dYB and A, then N in steps, then dYB and X by rows for dA."""
    BLOCK_M: gl.constexpr = dY_desc.block_type.shape[0]
    ROWS: gl.constexpr = X_desc.block_type.shape[0]
    step = 0
    for tile in range(gl.program_id(0), num_m * num_k, gl.num_programs(0)):
        pid_m, pid_k = tile_order(tile, num_m, num_k, GROUP_M)
        row = pid_m * BLOCK_M
        col = pid_k * W_desc.block_type.shape[1]
        if HAS_RANKS:
            step = fill(dYB_desc, A_desc, row, 0, 0, col, ps, ws, full, empty, step, STAGES)
        step = fill_tile(dY_desc, W_desc, row, col, num_n, ps, ws, full, empty, step, False, STAGES)
        if MAKE_DA:
            for m in gl.static_range(0, BLOCK_M, ROWS):
                step = fill(rows_desc, X_desc, row + m, 0, row + m, col, ps, ws, full, empty, step, STAGES)


@gluon.jit
def _dx_consumer(
    dX_desc, W_desc, dYB_desc, A_desc, X_desc, rows_desc, dA_ptr, keep_ptr, ps, ws, out, full, empty, num_m, num_k,
    num_n, M, K, r, stride_keep, factor, HAS_RANKS: gl.constexpr, MAKE_DA: gl.constexpr, DROPOUT: gl.constexpr,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """dX for every tile of this program, and the tile's rows' part of dA."""
    BLOCK_M: gl.constexpr = ps.shape[1]
    ROWS: gl.constexpr = ws.shape[1]
    BLOCK_N: gl.constexpr = ws.shape[2]
    BLOCK_R: gl.constexpr = A_desc.block_type.shape[0]
    tiles: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_N, 16])
    ranks: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_R, 16])
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_N, BLOCK_N // 8], [num_warps, 1], [1, 0])
    cube: gl.constexpr = (
        gl.zeros((BLOCK_M, BLOCK_N), gl.float32, tiles).reshape((BLOCK_M, BLOCK_N // 32, 32)).type.layout
    )
    x_cube: gl.constexpr = (
        gl.zeros((ROWS, BLOCK_N), dX_desc.dtype, lines).reshape((ROWS, BLOCK_N // 32, 32)).type.layout
    )
    programs = gl.num_programs(0)
    last = num_m * num_k - 1
    step = 0
    pid_m, pid_k = tile_order(gl.program_id(0), num_m, num_k, GROUP_M)
    if DROPOUT:
        words = _keep_words(keep_ptr, stride_keep, pid_m * BLOCK_M, pid_k * BLOCK_N, M, BLOCK_M, BLOCK_N, cube)
    for tile in range(gl.program_id(0), num_m * num_k, programs):
        row = pid_m * BLOCK_M
        col = pid_k * BLOCK_N
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, tiles)
        if HAS_RANKS:
            slot = await_full(full, step, STAGES)
            acc = warpgroup_mma(view(ps.index(slot), dYB_desc), view(ws.index(slot), A_desc), acc, is_async=True)
            acc = warpgroup_mma_wait(0, (acc,))
            mbarrier.arrive(empty.index(slot), count=1)
            if DROPOUT:
                acc = _masked(acc * factor, words, cube)
            step += 1
        acc, step = accumulate(acc, W_desc, ps, ws, full, empty, num_n, step, False, STAGES)
        acc = settle(acc, empty, step, STAGES)
        # masks are read ahead: the next tile's and X's arrive while dX goes out
        pid_m, pid_k = tile_order(gl.minimum(tile + programs, last), num_m, num_k, GROUP_M)
        if DROPOUT:
            words = _keep_words(keep_ptr, stride_keep, pid_m * BLOCK_M, pid_k * BLOCK_N, M, BLOCK_M, BLOCK_N, cube)
            if MAKE_DA:
                x_words = _keep_words(keep_ptr, stride_keep, row, col, M, ROWS, BLOCK_N, x_cube)
        finish(acc, dA_ptr, 0, K, dX_desc, out, row, col, False)
        if MAKE_DA:
            da = gl.zeros((BLOCK_N, BLOCK_R), gl.float32, ranks)
            for m in gl.static_range(0, BLOCK_M, ROWS):
                slot = await_full(full, step, STAGES)
                x = view(ws.index(slot), X_desc)
                if DROPOUT:
                    x.store(_masked(x.load(lines), x_words, x_cube))
                    fence_async_shared()
                    block_barrier()  # the products of every warp read what all warps have masked
                    if m + ROWS < BLOCK_M:
                        x_words = _keep_words(keep_ptr, stride_keep, row + m + ROWS, col, M, ROWS, BLOCK_N, x_cube)
                da = warpgroup_mma(x.permute((1, 0)), view(ps.index(slot), rows_desc), da, is_async=True)
                da = warpgroup_mma_wait(0, (da,))
                mbarrier.arrive(empty.index(slot), count=1)
                step += 1
            offs_k = col + gl.arange(0, BLOCK_N, gl.SliceLayout(1, ranks))[:, None]
            offs_r = gl.arange(0, BLOCK_R, gl.SliceLayout(0, ranks))[None, :]
            da_ptrs = dA_ptr + (gl.cast(row // BLOCK_M, gl.int64) * r + offs_r) * K + offs_k
            gl.store(da_ptrs, da, mask=(offs_k < K) & (offs_r < r))
    tma.store_wait(0)


@gluon.jit
def _gluon_dx_kernel(
    dY_desc,
    W_desc,
    dYB_desc,
    A_desc,
    X_desc,
    rows_desc,
    dX_desc,
    dA_ptr,
    keep_ptr,
    M,
    N,
    K,
    r,
    stride_keep,
    factor,
    HAS_RANKS: gl.constexpr,
    MAKE_DA: gl.constexpr,
    DROPOUT: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    num_warps: gl.constexpr,
):
    """dX = dY W + factor D*(dYB A), output tiles dealt out to resident programs, and partials of dA by row blocks."""
    ps, ws, full, empty = make_ring(dY_desc, W_desc, STAGES)
    out = gl.allocate_shared_memory(dX_desc.dtype, dX_desc.block_type.shape, dX_desc.layout)
    num_m = gl.cdiv(M, dY_desc.block_type.shape[0])
    num_k = gl.cdiv(K, W_desc.block_type.shape[1])
    num_n = gl.cdiv(N, dY_desc.block_type.shape[1])
    gl.warp_specialize(
        [
            (
                _dx_consumer,
                (
                    dX_desc, W_desc, dYB_desc, A_desc, X_desc, rows_desc, dA_ptr, keep_ptr, ps, ws, out, full, empty,
                    num_m, num_k, num_n, M, K, r, stride_keep, factor, HAS_RANKS, MAKE_DA, DROPOUT, STAGES, GROUP_M,
                    num_warps,
                ),
            ),
            (
                _dx_producer,
                (
                    dY_desc, W_desc, dYB_desc, A_desc, X_desc, rows_desc, ps, ws, full, empty, num_m, num_k, num_n,
                    HAS_RANKS, MAKE_DA, STAGES, GROUP_M,
                ),
            ),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )  # fmt: skip


def gluon_dx(
    dY: Tensor,
    W: Tensor,
    dYB: Tensor,
    A: Tensor,
    X: Tensor,
    drop: Dropout | None,
    config: GluonConfig,
    units: int,
    *,
    make_da: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """dX (M, K) in X's dtype, and dA (r, K) in A's: a launch of at most ``units`` programs, and a reduction for dA.

    dY (M, N), W (N, K), dYB (M, r), A (r, K) of any strides and float dtype, X (M, K); M > 0, r at most MOST_RANKS.
    r = 0 is the plain product, which benchmarks hold against the library's, and no dA.

    Raises:
        BackendUnavailableError: descriptors cannot take dY, W, X or dX; or dropout keeps a seed only, no bits.
    """
    (M, N), (r, K) = dY.shape, A.shape
    dX = torch.empty(M, K, dtype=X.dtype, device=X.device)
    keep = None
    if drop is not None:
        if drop.bits is None:
            raise BackendUnavailableError("gluon_dx reads dropout's mask as bits, given is a seed; keep the bits")
        row_bytes = drop.bits.stride(0)
        keep = drop.bits.as_strided((M, row_bytes), (row_bytes, 1)).view(torch.int32)
    check_descriptors(dY=dY, W=W, X=X, dX=dX)
    R, blocks_m = rank_tile(r, X.dtype) if r else 16, triton.cdiv(M, config.BLOCK_M)
    part_da = torch.empty(blocks_m, r, K, dtype=torch.float32, device=X.device) if make_da and r else None
    low_rank = low_rank_operand(dYB, X.dtype) if r else dY
    launch(
        _gluon_dx_kernel,
        (min(units, blocks_m * triton.cdiv(K, config.BLOCK_N)),),
        X.device,
        box(dY, config.BLOCK_M, config.BLOCK_K),
        box(W, config.BLOCK_K, config.BLOCK_N),
        box(low_rank, config.BLOCK_M, R),
        box(low_rank_operand(A, X.dtype) if r else W, R, config.BLOCK_N),
        box(X, config.BLOCK_K, config.BLOCK_N),
        box(low_rank, config.BLOCK_K, R),
        box(dX, config.BLOCK_M, config.BLOCK_N // 2),
        part_da,
        keep,
        M=M,
        N=N,
        K=K,
        r=r,
        stride_keep=0 if keep is None else keep.stride(0),
        factor=inv_keep(drop),
        HAS_RANKS=r > 0,
        MAKE_DA=part_da is not None,
        DROPOUT=drop is not None,
        PRODUCER_REGISTERS=config.PRODUCER_REGISTERS,
        STAGES=config.STAGES,
        GROUP_M=config.GROUP_M,
        num_warps=config.num_warps,
    )
    return dX, reduce_partials(Partial(part_da, A.dtype, inv_keep(drop)))[0]
