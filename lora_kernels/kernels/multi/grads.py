"""Computes the gradients of the adapters of a mixed batch, in which each row uses one adapter or none.

    dA_l = sum over rows m of slot l: dYB[m]^T X[m]  (R, K)        dB_l = sum over m of l: dY[m]^T XA[m]  (N, R)

multi_rows   lists the rows of each slot in the order of the batch: one launch, one program for each slot. A program
             reads the ids twice: to count the rows of the slots before its own, then to list its own rows. It needs no
             sort, no atomics and no work on the host.
multi_grads  computes both sums from those lists: a program gathers the rows of one span of a slot, which need not be
             adjacent, and sums them in fp32. With one span for each slot the sum is the result; with several, a second
             launch adds the partials in order.

dYB and XA are as shrink.py returns them: float32 if X and dY are float16, which are then widened for the dots. The bits
are the same in every run. X and dY of a row are added only to the sums of its own slot. The gradients of a slot that no
row uses are zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.common import precision_of
from lora_kernels.kernels.launch import launch
from lora_kernels.kernels.multi.shrink import low_rank_dot, slot_rows
from lora_kernels.kernels.multi.tiles import grads_rank_tile
from lora_kernels.kernels.tiles import SplitConfig
from lora_kernels.operands.slots import Slots

ROWS_BLOCK = 1024  # ids in one step of multi_rows
SUM_BLOCK = 1024  # elements for each program of the last sum


class Rows(NamedTuple):
    """Rows by slot, all int32: slot l has order[begins[l]] .. order[begins[l] + counts[l] - 1], ascending."""

    order: Tensor
    begins: Tensor
    counts: Tensor


@triton.jit
def _multi_rows_kernel(ids_ptr, order_ptr, begins_ptr, counts_ptr, M, BLOCK: tl.constexpr):
    """order[begins[l] + i] = i-th row of slot l; begins[l] = rows of slots before l."""
    slot = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), tl.int32)
    for m in range(0, M, BLOCK):
        ids = tl.load(ids_ptr + m + offs, mask=m + offs < M, other=-1)
        before += ((ids >= 0) & (ids < slot)).to(tl.int32)
    begin = tl.sum(before, axis=0)
    end = begin
    for m in range(0, M, BLOCK):
        mine = tl.load(ids_ptr + m + offs, mask=m + offs < M, other=-1) == slot
        one = mine.to(tl.int32)
        tl.store(order_ptr + end + tl.cumsum(one, axis=0) - one, m + offs, mask=mine)
        end += tl.sum(one, axis=0)
    tl.store(begins_ptr + slot, begin)
    tl.store(counts_ptr + slot, end - begin)


@triton.jit
def _span_sum(
    P_ptr,
    S_ptr,
    out_ptr,
    order_ptr,
    first,
    last,
    block,
    C,
    start,
    rank,
    max_rank,
    stride_pm,
    stride_pc,
    stride_sm,
    stride_or,
    stride_oc,
    EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[start + r, c] = sum over i in [first, last) of P[order[i], c] S[order[i], r], one block of r and one of c."""
    offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_c = offs_c < C
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for i in range(first, last, BLOCK_M):
        offs_i = i + tl.arange(0, BLOCK_M)
        mask_i = offs_i < last
        rows = tl.load(order_ptr + offs_i, mask=mask_i, other=0)[:, None].to(tl.int64)
        p_ptrs = P_ptr + rows * stride_pm + offs_c[None, :].to(tl.int64) * stride_pc
        s_ptrs = S_ptr + rows * stride_sm + offs_r[None, :]
        if EVEN_C:
            p = tl.load(p_ptrs, mask=mask_i[:, None], other=0.0)
        else:
            p = tl.load(p_ptrs, mask=mask_i[:, None] & mask_c[None, :], other=0.0)
        s = tl.load(s_ptrs, mask=mask_i[:, None] & (offs_r < max_rank)[None, :], other=0.0)
        acc = low_rank_dot(tl.trans(p), s, acc, PRECISION)
    out_rows = (start + offs_r)[None, :].to(tl.int64) * stride_or
    out_ptrs = out_ptr + out_rows + offs_c[:, None].to(tl.int64) * stride_oc
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_c[:, None] & (offs_r < rank)[None, :])


@triton.jit
def span_length(count, spans, BLOCK_M: tl.constexpr):
    """Return the rows of one span, a multiple of BLOCK_M, if ``count`` rows are cut into at most ``spans`` spans."""
    return tl.cdiv(tl.cdiv(count, BLOCK_M), spans) * BLOCK_M


@triton.jit
def _multi_grads_kernel(
    X_ptr,
    dYB_ptr,
    dA_ptr,
    dY_ptr,
    XA_ptr,
    dB_ptr,
    order_ptr,
    begins_ptr,
    counts_ptr,
    starts_ptr,
    ranks_ptr,
    K,
    N,
    R,
    max_rank,
    spans,
    stride_xm,
    stride_xk,
    stride_dybm,
    stride_dar,
    stride_dak,
    stride_dym,
    stride_dyn,
    stride_xam,
    stride_dbr,
    stride_dbn,
    MAKE_DA: tl.constexpr,
    MAKE_DB: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dA_l = dYB^T X, dB_l = dY^T XA over one span of slot l's rows: first the programs of dA, then those of dB.

    Slots, spans and columns share the grid's first axis, since the others are limited to 65,535 programs.
    """
    blocks = 0
    if MAKE_DA:
        blocks += tl.cdiv(K, BLOCK_N)
    if MAKE_DB:
        blocks += tl.cdiv(N, BLOCK_N)
    slot = tl.program_id(0) // blocks // spans
    span = tl.program_id(0) // blocks % spans
    count = tl.load(counts_ptr + slot)
    length = span_length(count, spans, BLOCK_M)
    start, rank = slot_rows(starts_ptr, ranks_ptr, slot, R, max_rank)
    if (span * length < count) & (tl.program_id(1) * BLOCK_R < rank):
        begin = tl.load(begins_ptr + slot)
        first = begin + span * length
        last = begin + tl.minimum(span * length + length, count)
        block = tl.program_id(0) % blocks
        if MAKE_DA:
            da_ptr = dA_ptr + span.to(tl.int64) * R * K
            if block < tl.cdiv(K, BLOCK_N):
                _span_sum(
                    X_ptr, dYB_ptr, da_ptr, order_ptr, first, last, block, K, start, rank, max_rank, stride_xm,
                    stride_xk, stride_dybm, stride_dar, stride_dak, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
                )  # fmt: skip
            block -= tl.cdiv(K, BLOCK_N)
        if MAKE_DB:
            db_ptr = dB_ptr + span.to(tl.int64) * R * N
            if block >= 0:
                _span_sum(
                    dY_ptr, XA_ptr, db_ptr, order_ptr, first, last, block, N, start, rank, max_rank, stride_dym,
                    stride_dyn, stride_xam, stride_dbr, stride_dbn, EVEN_N, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
                )  # fmt: skip


@triton.jit
def _add_spans(part_ptr, out_ptr, block, used, start, rank, R, C, stride_or, stride_oc, BLOCK: tl.constexpr):
    """out[start + r, c] = part_0[start + r, c] + part_1[..] + ..., one block of a slot's elements, c fastest."""
    offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < rank.to(tl.int64) * C
    part_ptrs = part_ptr + start.to(tl.int64) * C + offs
    step = tl.cast(R, tl.int64) * C
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(0, used):
        acc += tl.load(part_ptrs, mask=mask, other=0.0)
        part_ptrs += step
    out_ptrs = out_ptr + (start + offs // C) * stride_or + (offs % C) * stride_oc
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _multi_sum_kernel(
    part_a_ptr,
    dA_ptr,
    part_b_ptr,
    dB_ptr,
    counts_ptr,
    starts_ptr,
    ranks_ptr,
    K,
    N,
    R,
    max_rank,
    spans,
    stride_dar,
    stride_dak,
    stride_dbr,
    stride_dbn,
    MAKE_DA: tl.constexpr,
    MAKE_DB: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dA_l = sum of the spans' partials, dB_l likewise, for a block of one slot's elements; dA's come first."""
    blocks = 0
    if MAKE_DA:
        blocks += tl.cdiv(max_rank * K, BLOCK)
    if MAKE_DB:
        blocks += tl.cdiv(max_rank * N, BLOCK)
    slot = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    count = tl.load(counts_ptr + slot)
    if count > 0:
        used = tl.cdiv(count, span_length(count, spans, BLOCK_M))
        start, rank = slot_rows(starts_ptr, ranks_ptr, slot, R, max_rank)
        if MAKE_DA:
            if block < tl.cdiv(max_rank * K, BLOCK):
                _add_spans(part_a_ptr, dA_ptr, block, used, start, rank, R, K, stride_dar, stride_dak, BLOCK)
            block -= tl.cdiv(max_rank * K, BLOCK)
        if MAKE_DB and block >= 0:
            _add_spans(part_b_ptr, dB_ptr, block, used, start, rank, R, N, stride_dbr, stride_dbn, BLOCK)


def multi_rows(ids: Tensor, L: int) -> Rows:
    """The rows of each of L slots for ids int32 (M,), M > 0, L > 0; one launch."""
    M = ids.shape[0]
    rows = Rows(*torch.empty(M + 2 * L, dtype=torch.int32, device=ids.device).split([M, L, L]))
    launch(_multi_rows_kernel, (L,), ids.device, ids, *rows, M=M, BLOCK=ROWS_BLOCK, num_warps=4)
    return rows


def multi_grads(
    dY: Tensor,
    X: Tensor,
    XA: Tensor | None,
    dYB: Tensor | None,
    slots: Slots,
    ids: Tensor,
    config: SplitConfig,
    spans: int = 1,
) -> tuple[Tensor | None, Tensor | None]:
    """dA (R, K) in A's dtype if dYB is given, dB (N, R) in B's if XA is given, with the strides of A and B.

    dY (M, N) and X (M, K) of any strides, XA and dYB (M, max_rank), ids int32 (M,); M > 0. Two launches, three where a
    slot's rows are cut into several ``spans``, and the zeros.
    """
    N, (R, K), L = dY.shape[1], slots.A.shape, slots.starts.shape[0]
    dA = None if dYB is None else torch.zeros_like(slots.A)
    dB = None if XA is None else torch.zeros_like(slots.B)
    if not (slots.max_rank and L and R) or (dA is None and dB is None):
        return dA, dB
    rows = multi_rows(ids, L)
    outputs = [dA, None if dB is None else dB.t()]  # both (R, columns)
    sums = outputs
    if spans > 1:
        sums = [None if o is None else o.new_empty(spans, *o.shape, dtype=torch.float32) for o in outputs]
    made: dict[str, Any] = {"MAKE_DA": dA is not None, "MAKE_DB": dB is not None}
    BLOCK_R = grads_rank_tile(slots.max_rank, X.dtype)
    widths = [C for C, o in zip((K, N), outputs, strict=True) if o is not None]
    blocks = sum(triton.cdiv(C, config.BLOCK_N) for C in widths)
    sizes: dict[str, Any] = {"K": K, "N": N, "R": R, "max_rank": slots.max_rank, "spans": spans}
    launch(
        _multi_grads_kernel,
        (blocks * L * spans, triton.cdiv(slots.max_rank, BLOCK_R)),
        X.device,
        X,
        dYB,
        sums[0],
        dY,
        XA,
        sums[1],
        *rows,
        slots.starts,
        slots.ranks,
        **sizes,
        stride_xm=X.stride(0),
        stride_xk=X.stride(1),
        stride_dybm=0 if dYB is None else dYB.stride(0),
        stride_dym=dY.stride(0),
        stride_dyn=dY.stride(1),
        stride_xam=0 if XA is None else XA.stride(0),
        **_strides(sums),
        **made,
        EVEN_K=K % config.BLOCK_N == 0,
        EVEN_N=N % config.BLOCK_N == 0,
        PRECISION=precision_of(X.dtype),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_R=BLOCK_R,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if spans > 1:
        blocks = sum(triton.cdiv(slots.max_rank * C, SUM_BLOCK) for C in widths)
        launch(
            _multi_sum_kernel,
            (blocks * L,),
            X.device,
            sums[0],
            dA,
            sums[1],
            outputs[1],
            rows.counts,
            slots.starts,
            slots.ranks,
            **sizes,
            **_strides(outputs),
            **made,
            BLOCK_M=config.BLOCK_M,
            BLOCK=SUM_BLOCK,
            num_warps=4,
        )
    return dA, dB


def _strides(sums: list[Tensor | None]) -> dict[str, Any]:
    """Strides of rank and column of dA and dB^T, or of their partials."""
    names = (("stride_dar", "stride_dak"), ("stride_dbr", "stride_dbn"))
    return {
        name: 0 if t is None else t.stride(axis)
        for pair, t in zip(names, sums, strict=True)
        for name, axis in zip(pair, (-2, -1), strict=True)
    }
