"""XA of a batch in which every row has an adapter of its own, or none: one pass over the rows that have one.

    S[m, :r_l] = s_l P[m] Q_l^T,  l = ids[m]        P (M, C)  Q (R, C)  S (M, max_rank), zero elsewhere
    XA: P = X, Q = A        dYB: P = dY, Q = B^T by its strides

S is in low_rank_dtype(P.dtype): float32 for float16, else P's own. low_rank_dot has how the two meet.

A program makes a tile of rows and walks the slots that occur in it, the least first: the next one is a minimum over the
tile's ids, so there is no list of slots on the host and nothing is sorted. A slot's turn loads its own rows of P and
its own rows of Q, no others: however mixed a tile is, P is read once, and not at all where no row has an adapter.
A row takes nothing from another slot's turn, so what is not finite in one adapter stays with its own rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.common import precision_of
from lora_kernels.kernels.launch import launch
from lora_kernels.kernels.tiles import ShrinkConfig, rank_tile
from lora_kernels.operands.dtypes import low_rank_dtype
from lora_kernels.operands.slots import Slots


@triton.jit
def low_rank_dot(p, q, acc, PRECISION: tl.constexpr):
    """acc + p q for q in p's dtype; both in float32 where a float16 p meets a wider q, which float16 cannot hold.

    PRECISION: precision_of the layer's dtype.
    """
    if p.dtype == tl.float16 and q.dtype != tl.float16:
        p = p.to(tl.float32)
    return tl.dot(p, q.to(p.dtype), acc, input_precision=PRECISION)


@triton.jit
def load_ids(ids_ptr, offs_m, mask_m):
    """Slots of rows offs_m, -1 past the last row."""
    return tl.load(ids_ptr + offs_m, mask=mask_m, other=-1)


@triton.jit
def next_slot(ids, last, L):
    """The least slot above ``last`` that occurs in a tile's ids; L where there is none left."""
    return tl.min(tl.where((ids > last) & (ids < L), ids, L), axis=0)


@triton.jit
def slot_rows(starts_ptr, ranks_ptr, slot, R, max_rank):
    """(first row of A, rank) of a slot; rank 0 where there is none to read, never past row R or max_rank."""
    start = tl.load(starts_ptr + slot)
    rank = tl.load(ranks_ptr + slot)
    inside = (start >= 0) & (start < R)
    start = tl.where(inside, start, 0)
    return start, tl.where(inside, tl.minimum(tl.minimum(rank, max_rank), R - start), 0)


@triton.jit
def _multi_shrink_kernel(
    P_ptr,
    Q_ptr,
    S_ptr,
    ids_ptr,
    starts_ptr,
    ranks_ptr,
    scalings_ptr,
    M,
    C,
    R,
    L,
    max_rank,
    stride_pm,
    stride_pc,
    stride_qr,
    stride_qc,
    stride_sm,
    EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """S = s_l P Q_l^T for one tile of rows and one block of ranks; step_p, step_q: one step along C."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_rank = tl.program_id(1) * BLOCK_R
    offs_r = first_rank + tl.arange(0, BLOCK_R)
    offs_c = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    ids = load_ids(ids_ptr, offs_m, mask_m)
    p_rows = P_ptr + offs_m[:, None].to(tl.int64) * stride_pm + offs_c[None, :].to(tl.int64) * stride_pc
    q_cols = Q_ptr + offs_c[:, None].to(tl.int64) * stride_qc
    step_p = tl.cast(stride_pc, tl.int64) * BLOCK_K
    step_q = tl.cast(stride_qc, tl.int64) * BLOCK_K
    s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    slot = next_slot(ids, -1, L)
    while slot < L:
        start, rank = slot_rows(starts_ptr, ranks_ptr, slot, R, max_rank)
        if rank > first_rank:
            mine = ids == slot
            mask_r = offs_r < rank
            p_ptrs = p_rows
            q_ptrs = q_cols + (start + offs_r)[None, :].to(tl.int64) * stride_qr
            acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for k in range(0, tl.cdiv(C, BLOCK_K)):
                if EVEN_C:
                    p = tl.load(p_ptrs, mask=mine[:, None], other=0.0)
                    q = tl.load(q_ptrs, mask=mask_r[None, :], other=0.0)
                else:
                    mask_c = offs_c < C - k * BLOCK_K
                    p = tl.load(p_ptrs, mask=mine[:, None] & mask_c[None, :], other=0.0)
                    q = tl.load(q_ptrs, mask=mask_r[None, :] & mask_c[:, None], other=0.0)
                acc = low_rank_dot(p, q, acc, PRECISION)
                p_ptrs += step_p
                q_ptrs += step_q
            s = tl.where(mine[:, None], acc * tl.load(scalings_ptr + slot), s)
        slot = next_slot(ids, slot, L)
    s_ptrs = S_ptr + offs_m[:, None].to(tl.int64) * stride_sm + offs_r[None, :]
    tl.store(s_ptrs, s.to(S_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_r < max_rank)[None, :])


def multi_shrink(P: Tensor, Q: Tensor, slots: Slots, ids: Tensor, config: ShrinkConfig) -> Tensor:
    """S (M, max_rank) = s_l P[m] Q_l^T with l = ids[m], zero from rank r_l on and in rows without an adapter.

    P (M, C) and Q (R, C) of any strides and float dtypes, ids int32 (M,); M > 0. One launch, none for max_rank 0.
    """
    (M, C), dtype = P.shape, P.dtype
    S = P.new_empty(M, slots.max_rank, dtype=low_rank_dtype(dtype))
    BLOCK_R = rank_tile(slots.max_rank, dtype)
    grid = (triton.cdiv(M, config.BLOCK_M), triton.cdiv(slots.max_rank, BLOCK_R))
    if not S.numel():
        return S
    launch(
        _multi_shrink_kernel,
        grid,
        P.device,
        P,
        Q,
        S,
        ids,
        slots.starts,
        slots.ranks,
        slots.scalings,
        M=M,
        C=C,
        R=Q.shape[0],
        L=slots.starts.shape[0],
        max_rank=slots.max_rank,
        stride_pm=P.stride(0),
        stride_pc=P.stride(1),
        stride_qr=Q.stride(0),
        stride_qc=Q.stride(1),
        stride_sm=S.stride(0),
        EVEN_C=C % config.BLOCK_K == 0,
        PRECISION=precision_of(dtype),
        BLOCK_M=config.BLOCK_M,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=BLOCK_R,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return S
