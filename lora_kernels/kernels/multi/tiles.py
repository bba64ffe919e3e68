"""Tiles of the kernels for mixed batches: pure functions of shape, dtype and chip; tuning.is_valid checks them."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from lora_kernels.kernels.chip import KIB, Chip
from lora_kernels.kernels.tiles import (
    DECODE_ROWS,
    DecodeConfig,
    GemmConfig,
    ShrinkConfig,
    SplitConfig,
    expand_config,
    gemm_config,
    rank_tile,
    shrink_config,
    split_config,
)


def extend_rank_tile(max_rank: int, dtype: torch.dtype) -> int:
    """Ranks a step of multi_extend and multi_expand_add_: 64 spill on sm_100, and halve the blocks of sm_90.

    Of float16, whose XA and B are float32 in three TF32 products, 32 spill on sm_80.
    """
    return min(16 if dtype == torch.float16 else 32, rank_tile(max_rank, dtype))


def grads_rank_tile(max_rank: int, dtype: torch.dtype) -> int:
    """Ranks a program of multi_grads: 64 of float16, in three TF32 products, spill on sm_80."""
    return min(32 if dtype == torch.float16 else 64, rank_tile(max_rank, dtype))


def multi_shrink_config(M: int, dtype: torch.dtype, chip: Chip, max_rank: int, wide: bool = True) -> ShrinkConfig:
    """Tiles of multi_shrink: those of the pass for one adapter, but at most 32 rows, which hold fewer slots to walk.

    64 rows spill on sm_80, 86, 89 and 120; 32 rows with 64 ranks on four warps on sm_100; eight warps for 16 on sm_90;
    128 columns of float16, in three TF32 products, everywhere.
    """
    one = shrink_config(M, dtype, chip, max_rank, False, wide)
    if dtype == torch.float32 or not wide:
        return replace(one, BLOCK_M=min(one.BLOCK_M, 32), BLOCK_K=32, num_warps=4)
    few, rows, wide_step = max_rank <= 16, min(one.BLOCK_M, 32), not chip.is_amd and dtype != torch.float16
    warps = 8 if rows == 32 and not few and not chip.is_amd else 4
    return replace(one, BLOCK_M=rows, BLOCK_K=128 if few and wide_step else 64, num_warps=warps)


def multi_extend_config(M: int, N: int, dtype: torch.dtype, chip: Chip, max_rank: int, wide: bool = True) -> GemmConfig:
    """Tiles of multi_extend: those of the product for one adapter, but for 16 rows, where ptxas aims at 64 registers.

    In 16 bit half the step in one more stage leaves it room for the walk over slots; in float32 eight warps and three
    stages do (two spill on sm_80), unless every element has an address (not ``wide``).
    """
    one = gemm_config(M, N, dtype, chip, wide)
    if one.BLOCK_M > 16 or chip.is_amd or not wide:
        return one
    return replace(one, num_warps=8, num_stages=3) if dtype == torch.float32 else replace(one, BLOCK_K=32, num_stages=4)


def multi_expand_config(M: int, N: int, dtype: torch.dtype, chip: Chip, max_rank: int, wide: bool = True) -> GemmConfig:
    """Tiles of multi_expand_add_: those of the pass for one adapter, but for 16 rows, where eight warps spill."""
    one = expand_config(M, N, dtype, chip, wide)
    return replace(one, num_warps=4) if one.BLOCK_M == 16 else one


def multi_grads_config(M: int, dtype: torch.dtype, chip: Chip, max_rank: int) -> SplitConfig:
    """Tiles of multi_grads: those of the passes for one adapter; how many spans is multi_spans' to say.

    In float32 with two stages: with one, sm_90 has 32 registers and spills 6.
    """
    one = split_config(M, dtype, chip, max_rank)
    return replace(one, num_stages=2) if dtype == torch.float32 else one


def multi_spans(M: int, N: int, K: int, R: int, chip: Chip) -> int:
    """Into how many spans the rows of a slot are cut: two programs a multiprocessor if one slot has all rows.

    No more than leave the partials, 8 bytes an element written and read, at a quarter of the bytes of X and dY.
    """
    wanted = 2 * chip.units // max(1, -(-N // 128) + -(-K // 128))
    return max(1, min(wanted, M // (16 * max(R, 1)), -(-M // 256)))


@functools.lru_cache(maxsize=1024)
def multi_decode_config(M: int, N: int, K: int, dtype: torch.dtype, chip: Chip, wide: bool = True) -> DecodeConfig:
    """Tiles of multi_decode: two programs a multiprocessor that stream W, and room for one more that serves adapters.

    M decides of the tokens' side, of memory and of rows of W a tile, never of how a sum is cut: a row's bits are those
    of any M.
    """
    tokens = min(DECODE_ROWS, max(16, 1 << (M - 1).bit_length()))
    full = dtype == torch.float32  # dots on scalar units keep BLOCK_K columns of both operands in registers
    step = 16 if full else 64 if wide else 32
    split = max(1, min(2 * chip.units // -(-N // 64), -(-K // (2 * step)), 8))  # of more planes ptxas spills
    if chip.is_amd:
        return DecodeConfig(tokens, 64, step, num_warps=4, num_stages=2, SPLIT=split, RANK_STAGES=1)
    if full or not wide:
        rows = 64 if wide or tokens == 16 else 32  # an address for every element
        warps, most = 4 if wide or tokens < 64 else 8, 168 if wide and tokens < 64 else 255
        return DecodeConfig(tokens, rows, step, warps, num_stages=2, SPLIT=split, RANK_STAGES=1, maxnreg=most)
    small = chip.shared < 128 * KIB
    stages = (5 if tokens == 16 else 4) - small
    if tokens == 64:  # X comes from L2 once for every tile: half as often
        if small:  # eight warps spill on sm_120
            return DecodeConfig(tokens, 128, step, 4, num_stages=stages, SPLIT=split, LOW_N=16, maxnreg=255)
        return DecodeConfig(tokens, 128, step, num_warps=8, num_stages=stages, SPLIT=split, maxnreg=128)
    return DecodeConfig(tokens, 64, step, num_warps=4, num_stages=stages, SPLIT=split, maxnreg=168)
