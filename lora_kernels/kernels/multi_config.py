"""Tiles of the kernels for mixed batches: pure functions of shape, dtype and chip; tuning.is_valid checks them."""

from __future__ import annotations

import torch

from lora_kernels.kernels.chip import Chip
from lora_kernels.kernels.tuning import (
    GemmConfig,
    ShrinkConfig,
    SplitConfig,
    expand_config,
    gemm_config,
    shrink_config,
    split_config,
)


def multi_shrink_config(M: int, dtype: torch.dtype, chip: Chip, max_rank: int, wide: bool = True) -> ShrinkConfig:
    """Tiles of multi_shrink: those of the pass for one adapter."""
    return shrink_config(M, dtype, chip, max_rank, False, wide)


def multi_extend_config(M: int, N: int, dtype: torch.dtype, chip: Chip, max_rank: int, wide: bool = True) -> GemmConfig:
    """Tiles of multi_extend: those of the product for one adapter."""
    return gemm_config(M, N, dtype, chip, wide)


def multi_expand_config(M: int, N: int, dtype: torch.dtype, chip: Chip, max_rank: int, wide: bool = True) -> GemmConfig:
    """Tiles of multi_expand_add_: those of the pass for one adapter."""
    return expand_config(M, N, dtype, chip, wide)


def multi_grads_config(M: int, dtype: torch.dtype, chip: Chip, max_rank: int) -> SplitConfig:
    """Tiles of multi_grads: those of the passes for one adapter; how many spans is multi_spans' to say."""
    return split_config(M, dtype, chip, max_rank)


def multi_spans(M: int, N: int, K: int, R: int, chip: Chip) -> int:
    """Into how many spans the rows of a slot are cut: two programs a multiprocessor if one slot has all rows.

    No more than leave the partials, 8 bytes an element written and read, at a quarter of the bytes of X and dY.
    """
    wanted = 2 * chip.units // max(1, -(-N // 128) + -(-K // 128))
    return max(1, min(wanted, M // (16 * max(R, 1)), -(-M // 256)))
