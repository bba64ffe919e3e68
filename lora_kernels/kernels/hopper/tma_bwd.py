"""dX and dA of a LoRA linear layer with TMA descriptors: persistent programs on sm_90 and newer.

    dX = dY W + D/(1-p) * (dYB A)        dA = dYB^T (D*X) / (1-p)         dY (M,N)  W (N,K)  dYB (M,r)  A (r,K)  X (M,K)

One GEMM over N. The masked low-rank term opens the accumulator, so that the mask's registers are dead before the K loop
begins; dA's partial of a tile comes out of its epilogue, as (D*X)^T dYB: dYB^T (D*X) would have r rows, too few for a
wide matrix instruction. Opening and epilogue go half of the columns at a time, which is what fits into registers beside
a 128 x 256 accumulator. A program walks down DA_ROWS row blocks and adds their parts of dA to one partial of its own; a
reduction adds the partials in a fixed order: the same bits in every run.

dY, W, X and dX go through descriptors, A, dYB and the mask's bits through pointers. The mask is read, not drawn: Philox
beside a 128 x 256 accumulator spills 215 registers. docs/sm90_linear.md has the compile table. Not measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.errors import BackendUnavailableError
from lora_kernels.kernels.common import Dropout, dropout_args, inv_keep, keep_tile, tile_order
from lora_kernels.kernels.hopper.tma import descriptor, descriptor_refusal
from lora_kernels.kernels.launch import launch
from lora_kernels.kernels.persistent import add_low_rank, halves, rank_columns
from lora_kernels.kernels.reduce import Partial, reduce_partials
from lora_kernels.kernels.tiles import TmaDxConfig, rank_tile


@triton.jit
def _masked_term(
    dYB_ptr,
    A_ptr,
    seed_ptr,
    keep_ptr,
    offs_m,
    col,
    M,
    K,
    r,
    stride_sm,
    stride_ak,
    stride_ar,
    stride_keep,
    threshold,
    factor,
    DROPOUT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEP: tl.constexpr,
):
    """factor D*(dYB A) for rows offs_m and COLUMNS columns from col on, in fp32."""
    acc = tl.zeros((offs_m.shape[0], COLUMNS), tl.float32)
    acc = add_low_rank(
        acc, dYB_ptr, A_ptr, offs_m, col + tl.arange(0, COLUMNS), M, K, r, stride_sm, stride_ak, stride_ar, BLOCK_R,
        RANK_STEP, "ieee",
    )  # fmt: skip
    if DROPOUT:
        keep = keep_tile(seed_ptr, keep_ptr, stride_keep, offs_m, offs_m < M, col, K, threshold, COLUMNS, DROPOUT)
        acc = tl.where(keep, acc * factor, 0.0)
    return acc


@triton.jit
def _tma_dx_kernel(
    dY_desc,
    W_desc,
    X_desc,
    dX_desc,
    dYB_ptr,
    A_ptr,
    dA_ptr,
    seed_ptr,
    keep_ptr,
    M,
    N,
    K,
    r,
    stride_sm,
    stride_ar,
    stride_ak,
    stride_keep,
    threshold,
    factor,
    MAKE_DA: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    X_COLUMNS: tl.constexpr,
    RANK_STEP: tl.constexpr,
    DA_ROWS: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """dX = dY W + factor D*(dYB A), tiles of BLOCK_M rows and BLOCK_N columns, and each tile's part of dYB^T (D*X)."""
    HALF: tl.constexpr = BLOCK_N // 2
    STEP: tl.constexpr = RANK_STEP if BLOCK_R > RANK_STEP else BLOCK_R
    num_m = tl.cdiv(M, BLOCK_M)
    num_k = tl.cdiv(K, BLOCK_N)
    num_spans = tl.cdiv(num_m, DA_ROWS)
    tasks = tl.cdiv(num_spans * num_k - tl.program_id(0), tl.num_programs(0))
    for step in tl.range(0, tasks * DA_ROWS):  # one loop: in a nest, what does not change with the row fills registers
        task = tl.program_id(0) + step // DA_ROWS * tl.num_programs(0)
        span, pid_k = tile_order(task, num_spans, num_k, GROUP_M)
        pid_m = span * DA_ROWS + step % DA_ROWS
        row = pid_m * BLOCK_M
        col = pid_k * BLOCK_N
        offs_m = row + tl.arange(0, BLOCK_M)
        left = _masked_term(
            dYB_ptr, A_ptr, seed_ptr, keep_ptr, offs_m, col, M, K, r, stride_sm, stride_ak, stride_ar, stride_keep,
            threshold, factor, DROPOUT, HALF, BLOCK_R, RANK_STEP,
        )  # fmt: skip
        right = _masked_term(
            dYB_ptr, A_ptr, seed_ptr, keep_ptr, offs_m, col + HALF, M, K, r, stride_sm, stride_ak, stride_ar,
            stride_keep, threshold, factor, DROPOUT, HALF, BLOCK_R, RANK_STEP,
        )  # fmt: skip
        acc = tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (BLOCK_M, BLOCK_N))
        for n in tl.range(0, tl.cdiv(N, BLOCK_K)):
            dy = dY_desc.load([row, n * BLOCK_K])
            w = W_desc.load([n * BLOCK_K, col])
            acc = tl.dot(dy, w, acc)
        left, right = halves(acc)
        dX_desc.store([row, col], left.to(dX_desc.dtype))
        dX_desc.store([row, col + HALF], right.to(dX_desc.dtype))
        if MAKE_DA:
            for c in tl.static_range(0, BLOCK_N, X_COLUMNS):
                x = X_desc.load([row, col + c])
                if DROPOUT:
                    keep = keep_tile(
                        seed_ptr, keep_ptr, stride_keep, offs_m, offs_m < M, col + c, K, threshold, X_COLUMNS, DROPOUT
                    )
                    x = tl.where(keep, x, 0.0)
                offs_k = col + c + tl.arange(0, X_COLUMNS)
                for r0 in tl.static_range(0, BLOCK_R, STEP):
                    offs_r = r0 + tl.arange(0, STEP)
                    dyb = rank_columns(dYB_ptr, offs_m, offs_m < M, offs_r, r, stride_sm, 1)
                    da = tl.dot(x.T, dyb)
                    da_ptrs = dA_ptr + (span.to(tl.int64) * r + offs_r[None, :]) * K + offs_k[:, None]
                    mask = (offs_k < K)[:, None] & (offs_r < r)[None, :]
                    if DA_ROWS > 1:
                        da += tl.load(da_ptrs, mask=mask & (step % DA_ROWS > 0), other=0.0)
                    tl.store(da_ptrs, da, mask=mask)
            if DA_ROWS > 1:
                tl.debug_barrier()  # what this row block added is there when the next one reads it


def tma_dx(
    dY: Tensor,
    W: Tensor,
    dYB: Tensor,
    A: Tensor,
    X: Tensor,
    drop: Dropout | None,
    config: TmaDxConfig,
    units: int,
    *,
    make_da: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """dX (M, K) in X's dtype, and dA (r, K) in A's: a launch of at most ``units`` programs, and a reduction for dA.

    dY (M, N), W (N, K), dYB (M, r), A (r, K) of any strides and float dtype, X (M, K); M > 0, r at most one rank tile.

    Raises:
        BackendUnavailableError: descriptors cannot take dY, W, X or dX; or dropout keeps a seed only, no bits.
    """
    (M, N), (r, K) = dY.shape, A.shape
    dX = torch.empty(M, K, dtype=X.dtype, device=X.device)
    if reason := descriptor_refusal(dY=dY, W=W, X=X, dX=dX):
        raise BackendUnavailableError(f"TMA kernels cannot take this call: {reason}; copy it or name no plan")
    if drop is not None and drop.bits is None:
        raise BackendUnavailableError("tma_dx reads dropout's mask as bits, given is a seed; keep the bits in forward")
    spans, x_columns = triton.cdiv(M, config.BLOCK_M * config.DA_ROWS), max(64, config.BLOCK_N // 2)
    part_da = torch.empty(spans, r, K, dtype=torch.float32, device=X.device) if make_da else None
    launch(
        _tma_dx_kernel,
        (min(units, spans * triton.cdiv(K, config.BLOCK_N)),),
        X.device,
        descriptor(dY, config.BLOCK_M, config.BLOCK_K),
        descriptor(W, config.BLOCK_K, config.BLOCK_N),
        descriptor(X, config.BLOCK_M, x_columns),
        descriptor(dX, config.BLOCK_M, config.BLOCK_N // 2),
        dYB,
        A,
        part_da,
        M=M,
        N=N,
        K=K,
        r=r,
        stride_sm=dYB.stride(0),
        stride_ar=A.stride(0),
        stride_ak=A.stride(1),
        factor=inv_keep(drop),
        MAKE_DA=make_da,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=rank_tile(r, X.dtype),
        X_COLUMNS=x_columns,
        RANK_STEP=config.RANK_STEP,
        DA_ROWS=config.DA_ROWS,
        GROUP_M=config.GROUP_M,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **dropout_args(drop),
    )
    return dX, reduce_partials(Partial(part_da, A.dtype, inv_keep(drop)))[0]
