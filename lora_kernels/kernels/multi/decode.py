"""Few rows, each with an adapter of its own or none, in one launch that reads W once: decode, up to 64 rows, forward.

    Y[m] = X[m] W^T + bias + s_l X[m] A_l^T B_l^T,  l = ids[m]     X (M,K)  W (N,K)  A (R,K)  B (N,R)  Y (M,N)

W programs stream one share of K of one tile of W's rows each and wait for nothing; rows of W are the wide side of the
matrix unit, tokens the narrow one. Adapter programs, of the lowest ids, run beside them:

    part[k, m] = X[m, span k] A_l[:, span k]^T       a task: a block of ranks of a slot that occurs, a span of K
    XA[m]      = s_l (part[0, m] + part[1, m] + ..)  by the program that finishes a block's last task
    low[m, n]  = XA[m] B_l^T                         every tile of N, once all blocks of XA are there
    Y          = shares of K in order + low + bias   by the last program to arrive at a tile, whichever it is

Tasks are claimed by a counter. An adapter program waits for XA only when every task is claimed, thus only for programs
that run and wait for nothing themselves: it ends on any grid, resident or not, whatever the order of the programs.
All of the mix is data of the device. Sizes of spans and shares depend on N, K and the chip alone, and each sum has one
order: a row's bits depend neither on the run nor on the other rows. docs/multi_decode.md has the protocol, floors and
what was lost. Not measured on a GPU.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.common import precision_of
from lora_kernels.kernels.launch import launch
from lora_kernels.kernels.multi.shrink import load_ids, low_rank_dot, slot_rows
from lora_kernels.kernels.multi.workspace import workspace_of
from lora_kernels.kernels.tiles import SHRINK_K, SHRINK_RANKS, DecodeConfig
from lora_kernels.operands.slots import Slots

LOW = tl.constexpr(1 << 16)  # beside the number of arrivals at a tile: its low-rank term is there
HEAD = tl.constexpr(3)  # counters of a whole launch: tasks claimed, blocks of XA finished, adapter programs past both


@triton.jit
def span_product(
    acc,
    P_ptr,
    Q_ptr,
    offs_m,
    offs_n,
    mask_m,
    mask_n,
    first,
    last,
    stride_pm,
    stride_pk,
    stride_qn,
    stride_qk,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVICT: tl.constexpr,
):
    """acc (BLOCK_M, BLOCK_N) + P Q^T over columns first .. last of P (M, K), Q (N, K), any strides and float dtypes."""
    offs_k = tl.arange(0, BLOCK_K)
    from_p = tl.cast(first, tl.int64) * stride_pk
    from_q = tl.cast(first, tl.int64) * stride_qk
    p_ptrs = P_ptr + from_p + offs_m[:, None].to(tl.int64) * stride_pm + offs_k[None, :].to(tl.int64) * stride_pk
    q_ptrs = Q_ptr + from_q + offs_n[None, :].to(tl.int64) * stride_qn + offs_k[:, None].to(tl.int64) * stride_qk
    step_p = tl.cast(stride_pk, tl.int64) * BLOCK_K
    step_q = tl.cast(stride_qk, tl.int64) * BLOCK_K
    for k in range(first, last, BLOCK_K):
        if EVEN_K:
            p = tl.load(p_ptrs, mask=mask_m[:, None], other=0.0, eviction_policy=EVICT)
            q = tl.load(q_ptrs, mask=mask_n[None, :], other=0.0)
        else:
            mask_k = offs_k < last - k
            p = tl.load(p_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0, eviction_policy=EVICT)
            q = tl.load(q_ptrs, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        acc = low_rank_dot(p, q, acc, PRECISION)
        p_ptrs += step_p
        q_ptrs += step_q
    return acc


@triton.jit
def rank_block_of(block, begins, counts, starts, ranks, BLOCK_R: tl.constexpr):
    """(row of X that stands for the slot, row of A, ranks, first rank) of one block of ranks of the batch.

    begins, counts, starts, ranks: of each row's slot; counts is 0 but in the first row of a slot.
    """
    own = (block >= begins) & (block < begins + counts)
    place = tl.arange(0, begins.shape[0])
    code = tl.sum(tl.where(own, (block - begins) * begins.shape[0] + place, 0), axis=0)
    start = tl.sum(tl.where(own, starts, 0), axis=0)
    rank = tl.sum(tl.where(own, ranks, 0), axis=0)
    first_rank = code // begins.shape[0] * BLOCK_R
    return code % begins.shape[0], start + first_rank, rank - first_rank, first_rank


@triton.jit
def arrive(
    count_ptr,
    plane_ptr,
    Y_ptr,
    bias_ptr,
    offs_m,
    tile,
    M,
    N,
    stride_bias,
    stride_ym,
    weight,
    expected,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Count a plane of a tile; the last to come makes Y = planes in their order + bias, and puts the count to 0."""
    tl.debug_barrier()  # every thread's part of the plane is written before one thread releases it
    count = tl.atomic_add(count_ptr + tile, weight, sem="acq_rel") + weight
    if count % LOW == expected:
        tl.atomic_xchg(count_ptr + tile, 0, sem="relaxed")
        BLOCK_M: tl.constexpr = offs_m.shape[0]
        COLUMNS: tl.constexpr = 64 if BLOCK_N > 64 else BLOCK_N  # at a time: what registers hold of several planes
        for col in range(0, BLOCK_N, COLUMNS):
            offs_c = col + tl.arange(0, COLUMNS)
            offs_n = tile * BLOCK_N + offs_c
            mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
            places = plane_ptr + offs_m[:, None] * BLOCK_N + offs_c[None, :]
            y = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
            for share in tl.static_range(SPLIT):
                y += tl.load(places + share * BLOCK_M * BLOCK_N, mask=mask, other=0.0)
            if count >= LOW:
                y += tl.load(places + SPLIT * BLOCK_M * BLOCK_N, mask=mask, other=0.0)
            if HAS_BIAS:
                bias = tl.load(bias_ptr + offs_n.to(tl.int64) * stride_bias, mask=offs_n < N, other=0.0)
                y += bias.to(tl.float32)[None, :]
            y_ptrs = Y_ptr + offs_m[:, None].to(tl.int64) * stride_ym + offs_n[None, :]
            tl.store(y_ptrs, y.to(Y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def plane_of(planes_ptr, tile, share, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr):
    """The fp32 plane (BLOCK_M, BLOCK_N) of a tile and a share of K; share SPLIT is the low-rank term."""
    return planes_ptr + (tl.cast(tile, tl.int64) * (SPLIT + 1) + share) * (BLOCK_M * BLOCK_N)


@triton.jit(do_not_specialize=["M", "R", "L", "max_rank", "adapter_programs"])
def _multi_decode_kernel(
    X_ptr,
    W_ptr,
    A_ptr,
    B_ptr,
    bias_ptr,
    Y_ptr,
    ids_ptr,
    starts_ptr,
    ranks_ptr,
    scalings_ptr,
    counters_ptr,
    planes_ptr,
    parts_ptr,
    XA_ptr,
    M,
    N,
    K,
    R,
    L,
    max_rank,
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
    adapter_programs,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLIT: tl.constexpr,
    SHRINK_K: tl.constexpr,
    LOW_N: tl.constexpr,
    RANK_STAGES: tl.constexpr,
):
    """Y = X W^T + bias + s_l X A_l^T B_l^T, as the head of this file has it."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(N, BLOCK_N)
    tile_counts = counters_ptr + HEAD
    block_counts = tile_counts + tiles
    LOWS: tl.constexpr = BLOCK_N // LOW_N
    expected = SPLIT + LOWS * (adapter_programs > 0).to(tl.int32)
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    offs_c = tl.arange(0, BLOCK_N)
    if pid >= adapter_programs:
        item = pid - adapter_programs
        tile = item // SPLIT
        share = item % SPLIT
        steps = tl.cdiv(K, BLOCK_K)
        offs_n = tile * BLOCK_N + offs_c
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        acc = span_product(
            acc, W_ptr, X_ptr, offs_n, offs_m, offs_n < N, mask_m, steps * share // SPLIT * BLOCK_K,
            tl.minimum(steps * (share + 1) // SPLIT * BLOCK_K, K), stride_wn, stride_wk, stride_xm, stride_xk, EVEN_K,
            PRECISION, BLOCK_K, "evict_first",
        )  # fmt: skip
        plane = plane_of(planes_ptr, tile, share, BLOCK_M, BLOCK_N, SPLIT)
        tl.store(plane + offs_m[None, :] * BLOCK_N + offs_c[:, None], acc, mask=mask_m[None, :])
        arrive(
            tile_counts, plane_of(planes_ptr, tile, 0, BLOCK_M, BLOCK_N, SPLIT), Y_ptr, bias_ptr, offs_m, tile, M, N,
            stride_bias, stride_ym, 1, expected, HAS_BIAS, BLOCK_N, SPLIT,
        )  # fmt: skip
    else:
        ids = load_ids(ids_ptr, offs_m, mask_m)
        task = tl.atomic_add(counters_ptr, 1, sem="relaxed")
        known = (ids >= 0) & (ids < L)
        slots = tl.where(known, ids, 0)
        starts, ranks = slot_rows(starts_ptr, ranks_ptr, slots, R, max_rank)
        scales = tl.load(scalings_ptr + slots)
        ranks = tl.where(known, tl.maximum(ranks, 0), 0)
        owners = tl.min(tl.where(ids[:, None] == ids[None, :], offs_m[None, :], BLOCK_M), axis=1)  # a slot's first row
        counts = tl.where(owners == offs_m, tl.cdiv(ranks, BLOCK_R), 0)
        begins = tl.cumsum(counts, axis=0) - counts
        blocks = tl.sum(counts, axis=0)
        spans = tl.cdiv(K, SHRINK_K)
        offs_r = tl.arange(0, BLOCK_R)
        STEP: tl.constexpr = BLOCK_K // 2 if X_ptr.dtype.element_ty == tl.float16 else BLOCK_K  # widened: registers
        s_rows = offs_m[:, None].to(tl.int64) * stride_sm + offs_r[None, :]
        part_step = tl.cast(stride_sm, tl.int64) * BLOCK_M
        while task < blocks * spans:
            block = task // spans
            span = task % spans
            owner, row, rank, first_rank = rank_block_of(block, begins, counts, starts, ranks, BLOCK_R)
            mine = owners == owner
            mask_s = mine[:, None] & (offs_r < rank)[None, :]
            s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            s = span_product(
                s, X_ptr, A_ptr, offs_m, row + offs_r, mine, offs_r < rank, span * SHRINK_K,
                tl.minimum((span + 1) * SHRINK_K, K), stride_xm, stride_xk, stride_ar, stride_ak, EVEN_K, PRECISION,
                STEP, "",
            )  # fmt: skip
            part_ptrs = parts_ptr + s_rows + first_rank
            tl.store(part_ptrs + span * part_step, s, mask=mask_s)
            tl.debug_barrier()  # every thread's part is written before one thread releases it
            if tl.atomic_add(block_counts + block, 1, sem="acq_rel") == spans - 1:
                tl.atomic_xchg(block_counts + block, 0, sem="relaxed")
                s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
                for _ in range(0, spans):
                    s += tl.load(part_ptrs, mask=mask_s, other=0.0)
                    part_ptrs += part_step
                xa = (s * scales[:, None]).to(XA_ptr.dtype.element_ty)
                tl.store(XA_ptr + s_rows + first_rank, xa, mask=mask_s)
                tl.debug_barrier()
                tl.atomic_add(counters_ptr + 1, 1, sem="release")
            task = tl.atomic_add(counters_ptr, 1, sem="relaxed")
        while tl.atomic_add(counters_ptr + 1, 0, sem="acquire") < blocks:
            pass
        if tl.atomic_add(counters_ptr + 2, 1, sem="acq_rel") == adapter_programs - 1:
            tl.atomic_xchg(counters_ptr, 0, sem="relaxed")
            tl.atomic_xchg(counters_ptr + 1, 0, sem="relaxed")
            tl.atomic_xchg(counters_ptr + 2, 0, sem="relaxed")
        offs_l = tl.arange(0, LOW_N)
        for low_tile in range(pid, tiles * LOWS, adapter_programs):
            offs_n = low_tile * LOW_N + offs_l
            low = tl.zeros((BLOCK_M, LOW_N), tl.float32)
            for block in tl.range(0, blocks, num_stages=RANK_STAGES):
                owner, row, rank, first_rank = rank_block_of(block, begins, counts, starts, ranks, BLOCK_R)
                mine = owners == owner
                mask_r = offs_r < rank
                b_rows = (row + offs_r)[:, None].to(tl.int64) * stride_br
                b_ptrs = B_ptr + offs_n[None, :].to(tl.int64) * stride_bn + b_rows
                xa = tl.load(XA_ptr + s_rows + first_rank, mask=mine[:, None] & mask_r[None, :], other=0.0)
                b = tl.load(b_ptrs, mask=(offs_n < N)[None, :] & mask_r[:, None], other=0.0)
                low = tl.where(mine[:, None], low_rank_dot(xa, b, low, PRECISION), low)
            planes = plane_of(planes_ptr, low_tile // LOWS, 0, BLOCK_M, BLOCK_N, SPLIT)
            if blocks > 0:
                columns = low_tile % LOWS * LOW_N + offs_l
                places = planes + SPLIT * BLOCK_M * BLOCK_N + offs_m[:, None] * BLOCK_N + columns[None, :]
                tl.store(places, low, mask=mask_m[:, None])
            arrive(
                tile_counts, planes, Y_ptr, bias_ptr, offs_m, low_tile // LOWS, M, N, stride_bias, stride_ym,
                tl.where(blocks > 0, 1 + LOW, 1), expected, HAS_BIAS, BLOCK_N, SPLIT,
            )  # fmt: skip


class Sizes(NamedTuple):
    """What one launch takes: its grid, and elements of each part of a Workspace."""

    tiles: int
    adapter_programs: int
    pitch: int
    workspace: tuple[int, int, int, int]


@functools.lru_cache(maxsize=1024)
def sizes_of(N: int, K: int, L: int, max_rank: int, config: DecodeConfig, units: int) -> Sizes:
    """Sizes for a layer (N, K) and L slots; one adapter program a multiprocessor, none where no slot has ranks."""
    tiles, rank_blocks = triton.cdiv(N, config.BLOCK_N), triton.cdiv(max_rank, SHRINK_RANKS)
    pitch, rows = rank_blocks * SHRINK_RANKS, config.BLOCK_M
    workspace = (
        HEAD.value + tiles + rows * rank_blocks,
        tiles * (config.SPLIT + 1) * rows * config.BLOCK_N,
        triton.cdiv(K, SHRINK_K) * rows * pitch,
        rows * pitch,
    )
    return Sizes(tiles, units if L and max_rank else 0, pitch, workspace)


def multi_decode(
    X: Tensor,
    W: Tensor,
    slots: Slots,
    ids: Tensor,
    bias: Tensor | None,
    config: DecodeConfig,
    units: int,
    out: Tensor | None = None,
) -> Tensor:
    """Y (M, N) = X W^T + bias + s_l X[m] A_l^T B_l^T with l = ids[m] in one launch, in ``out`` where it is given.

    X (M, K), W (N, K), A, B, bias of any strides, A and B of any float dtype, ids int32 (M,), 0 < M <= BLOCK_M of
    ``config``; rows of ``out`` (M, N) are contiguous. ``units``: the multiprocessors. An id that names no slot, or an
    empty one, gives its row the base alone.
    """
    (M, K), N, dtype = X.shape, W.shape[0], X.dtype
    assert config.BLOCK_M >= M, f"{M} rows, and {config} takes up to {config.BLOCK_M}"
    L, max_rank = slots.starts.shape[0], slots.max_rank
    sizes = sizes_of(N, K, L, max_rank, config, units)
    limit: dict[str, Any] = {} if config.maxnreg is None else {"maxnreg": config.maxnreg}
    space = workspace_of(sizes.workspace, X.device, dtype)
    Y = X.new_empty(M, N) if out is None else out
    launch(
        _multi_decode_kernel,
        (sizes.adapter_programs + sizes.tiles * config.SPLIT,),
        X.device,
        X,
        W,
        slots.A,
        slots.B,
        bias,
        Y,
        ids,
        slots.starts,
        slots.ranks,
        slots.scalings,
        space.counters,
        space.planes,
        space.parts,
        space.XA,
        M=M,
        N=N,
        K=K,
        R=slots.A.shape[0],
        L=L,
        max_rank=max_rank,
        stride_xm=X.stride(0),
        stride_xk=X.stride(1),
        stride_wn=W.stride(0),
        stride_wk=W.stride(1),
        stride_ar=slots.A.stride(0),
        stride_ak=slots.A.stride(1),
        stride_bn=slots.B.stride(0),
        stride_br=slots.B.stride(1),
        stride_bias=0 if bias is None else bias.stride(0),
        stride_ym=Y.stride(0),
        stride_sm=sizes.pitch,
        adapter_programs=sizes.adapter_programs,
        HAS_BIAS=bias is not None,
        EVEN_K=K % config.BLOCK_K == 0,
        PRECISION=precision_of(dtype),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=SHRINK_RANKS,
        SPLIT=config.SPLIT,
        SHRINK_K=SHRINK_K,
        LOW_N=config.LOW_N,
        RANK_STAGES=config.RANK_STAGES,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **limit,
    )
    return Y
