"""The product of a batch in which every row has an adapter of its own, or none, with pointers: runs on every chip.

    Y[m] = X[m] W^T + bias + XA[m, :r_l] B_l^T,  l = ids[m]        X (M,K)  W (N,K)  XA (M,max_rank)  B (N,R)  Y (M,N)

XA, and dYB in its place, is as multi_shrink.py leaves it; B is converted to its dtype.

multi_extend       that, as one GEMM in its usual order of tiles. By strides the same kernel makes dX = dY W + dYB A_l.
multi_expand_add_  Y += XA B_l^T into a Y that the vendor's library made; tiles and rows without an adapter stay unread.

A tile walks the slots that occur in its rows before its K loop: the low-rank term opens the accumulator (no register
operand near the pipelined loop, which is that of a layer without adapters). What is not finite in one adapter stays
with its own rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.common import accumulate, precision_of, tile_order
from lora_kernels.kernels.launch import launch
from lora_kernels.kernels.multi.shrink import load_ids, low_rank_dot, next_slot, slot_rows
from lora_kernels.kernels.multi.tiles import extend_rank_tile
from lora_kernels.kernels.tiles import GemmConfig
from lora_kernels.operands.slots import Slots


@triton.jit
def multi_low_rank(
    S_ptr,
    T_ptr,
    ids,
    starts_ptr,
    ranks_ptr,
    slot,
    offs_m,
    offs_n,
    mask_n,
    R,
    L,
    max_rank,
    stride_sm,
    stride_tn,
    stride_tr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """S[m] T_l^T (BLOCK_M, BLOCK_N) in fp32 for l = ids[m], from ``slot`` on; zero in rows without an adapter.

    S (M, max_rank) with ranks side by side and zeros from rank r_l on, T (N, R) of any strides, cast to S's dtype.
    Rows of other slots add zeros times T, so a column where T is not finite adds nothing and is made NaN in the slot's
    own rows: one accumulator, where selecting a term of its own would take two (181 registers on sm_90 for 124).
    TF32 rounds to infinity from 3.402e38 on.
    """
    LIMIT: tl.constexpr = float("inf") if PRECISION == "ieee" else 3.4e38
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    while slot < L:
        start, rank = slot_rows(starts_ptr, ranks_ptr, slot, R, max_rank)
        mine = ids == slot
        lost = tl.zeros((BLOCK_N,), tl.int32)
        for r0 in tl.range(0, rank, BLOCK_R, num_stages=1):
            offs_r = r0 + tl.arange(0, BLOCK_R)
            s_ptrs = S_ptr + offs_m[:, None].to(tl.int64) * stride_sm + offs_r[None, :]
            t_rows = (start + offs_r)[:, None].to(tl.int64) * stride_tr
            t_ptrs = T_ptr + offs_n[None, :].to(tl.int64) * stride_tn + t_rows
            s = tl.load(s_ptrs, mask=mine[:, None] & (offs_r < max_rank)[None, :], other=0.0)
            t = tl.load(t_ptrs, mask=mask_n[None, :] & (offs_r < rank)[:, None], other=0.0).to(s.dtype)
            finite = tl.abs(t.to(tl.float32)) < LIMIT
            acc = low_rank_dot(s, tl.where(finite, t, 0.0), acc, PRECISION)
            lost += tl.sum((finite == 0).to(tl.int32), axis=0)
        acc = tl.where(mine[:, None] & (lost > 0)[None, :], float("nan"), acc)
        slot = next_slot(ids, slot, L)
    return acc


@triton.jit
def _multi_extend_kernel(
    X_ptr,
    W_ptr,
    XA_ptr,
    B_ptr,
    bias_ptr,
    Y_ptr,
    ids_ptr,
    starts_ptr,
    ranks_ptr,
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
    """Y = X W^T + bias + XA B_l^T, one output tile a program."""
    pid_m, pid_n = tile_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    ids = load_ids(ids_ptr, offs_m, mask_m)
    acc = multi_low_rank(
        XA_ptr, B_ptr, ids, starts_ptr, ranks_ptr, next_slot(ids, -1, L), offs_m, offs_n, mask_n, R, L, max_rank,
        stride_sm, stride_bn, stride_br, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
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
def _multi_expand_kernel(
    Y_ptr,
    XA_ptr,
    B_ptr,
    ids_ptr,
    starts_ptr,
    ranks_ptr,
    M,
    N,
    R,
    L,
    max_rank,
    stride_ym,
    stride_sm,
    stride_bn,
    stride_br,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Y += XA B_l^T for one tile of Y; nothing where no row of it has an adapter."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    ids = load_ids(ids_ptr, offs_m, offs_m < M)
    slot = next_slot(ids, -1, L)
    if slot < L:
        acc = multi_low_rank(
            XA_ptr, B_ptr, ids, starts_ptr, ranks_ptr, slot, offs_m, offs_n, mask_n, R, L, max_rank, stride_sm,
            stride_bn, stride_br, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
        )  # fmt: skip
        y_ptrs = Y_ptr + offs_m[:, None].to(tl.int64) * stride_ym + offs_n[None, :]
        mask = ((ids >= 0) & (ids < L))[:, None] & mask_n[None, :]
        y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32) + acc
        tl.store(y_ptrs, y.to(Y_ptr.dtype.element_ty), mask=mask)


def multi_extend(
    X: Tensor,
    W: Tensor,
    XA: Tensor,
    B: Tensor,
    slots: Slots,
    ids: Tensor,
    bias: Tensor | None,
    config: GemmConfig,
    out: Tensor | None = None,
) -> Tensor:
    """Y (M, N) = X W^T + bias + XA[m, :r_l] B_l^T in one launch, in ``out`` where it is given; M > 0.

    X (M, K), W (N, K), B (N, R), bias (N,) or None of any strides, XA (M, max_rank), ids int32 (M,); rows of ``out``
    (M, N) are contiguous. For dX hand in dY, W^T, dYB and A^T.
    """
    (M, K), N = X.shape, W.shape[0]
    Y = X.new_empty(M, N) if out is None else out
    launch(
        _multi_extend_kernel,
        (triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N),),
        X.device,
        X,
        W,
        XA,
        B,
        bias,
        Y,
        ids,
        slots.starts,
        slots.ranks,
        M=M,
        N=N,
        K=K,
        R=B.shape[1],
        L=slots.starts.shape[0],
        max_rank=slots.max_rank,
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
        BLOCK_R=extend_rank_tile(slots.max_rank, X.dtype),
        GROUP_M=config.GROUP_M,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return Y


def multi_expand_add_(Y: Tensor, XA: Tensor, B: Tensor, slots: Slots, ids: Tensor, config: GemmConfig) -> Tensor:
    """Y (M, N) += XA[m, :r_l] B_l^T in place, for a Y just made by the caller; one launch, none for max_rank 0; M > 0.

    B (N, R) of any strides; rows of Y are contiguous. For dX hand in dYB and A^T.
    """
    (M, N), L = Y.shape, slots.starts.shape[0]
    if not slots.max_rank:
        return Y
    launch(
        _multi_expand_kernel,
        (triton.cdiv(M, config.BLOCK_M), triton.cdiv(N, config.BLOCK_N)),
        Y.device,
        Y,
        XA,
        B,
        ids,
        slots.starts,
        slots.ranks,
        M=M,
        N=N,
        R=B.shape[1],
        L=L,
        max_rank=slots.max_rank,
        stride_ym=Y.stride(0),
        stride_sm=XA.stride(0),
        stride_bn=B.stride(0),
        stride_br=B.stride(1),
        PRECISION=precision_of(Y.dtype),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_R=extend_rank_tile(slots.max_rank, Y.dtype),
        num_warps=config.num_warps,
        num_stages=1,
    )
    return Y
