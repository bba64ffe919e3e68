"""Tiles of the warp-specialised Hopper kernels; no Triton is needed to choose or to refuse them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_kernels.kernels.chip import KIB, Chip
from lora_kernels.operands.dtypes import low_rank_dtype

MOST_RANKS = 64  # one ring slot holds all ranks of a tile


@dataclass(frozen=True)
class GluonConfig:
    """Tiles of a persistent product: one producer warp fills a ring, ``num_warps`` consumer warps multiply from it.

    STAGES: slots of the ring, each a (BLOCK_M, BLOCK_K) tile and a (BLOCK_N, BLOCK_K) tile.
    PRODUCER_REGISTERS: registers a thread of the producer keeps; the consumers take over the rest.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    STAGES: int
    PRODUCER_REGISTERS: int = 40
    GROUP_M: int = 8


def gluon_config(M: int, N: int, r: int, dtype: torch.dtype, chip: Chip) -> GluonConfig:
    """Tiles for M rows and N columns of output: 128x256 where that gives every multiprocessor a tile, else 128x128,
    and 64x128 for up to 64 rows. The ring takes what shared memory there is."""
    if M <= 64:
        return GluonConfig(64, 128, 64, num_warps=4, STAGES=9)
    wide_tiles = -(-M // 128) * -(-N // 256)
    if wide_tiles < chip.units:
        return GluonConfig(128, 128, 64, num_warps=8, STAGES=6)
    return GluonConfig(128, 256, 64, num_warps=8, STAGES=4)


def gluon_shared_bytes(config: GluonConfig, dtype: torch.dtype) -> int:
    """Shared memory one block needs: the ring, half a tile of output, barriers and the compiler's scratch."""
    ring = config.STAGES * (config.BLOCK_M + config.BLOCK_N) * config.BLOCK_K
    return (ring + config.BLOCK_M * config.BLOCK_N // 2) * dtype.itemsize + KIB


def refusal(config: GluonConfig, dtype: torch.dtype, r: int, chip: Chip) -> str | None:
    """None where the kernels can run as ``config`` on ``chip``; otherwise the reason they cannot."""
    if chip.arch != "sm_90":
        return f"{chip.arch} has no warpgroup matrix unit, sm_90 alone has"
    if dtype.itemsize != 2:
        return f"its tiles are 16-bit, not {dtype}"
    if low_rank_dtype(dtype) is not dtype:
        return f"its ring holds XA and dYB in 16 bit, a {dtype} layer keeps them in float32; pointer kernels take those"
    if r > MOST_RANKS:
        return f"r={r} is above {MOST_RANKS}, one ring slot of ranks"
    if config.num_warps % 4 or config.BLOCK_M % (16 * config.num_warps):
        return f"BLOCK_M={config.BLOCK_M} is not 64 rows for each four of {config.num_warps} warps"
    if config.BLOCK_N % (16 * config.num_warps):
        return f"BLOCK_N={config.BLOCK_N} is not 64 columns for each four of {config.num_warps} warps"
    if config.BLOCK_K * dtype.itemsize != 128 or config.BLOCK_N > 256:
        return f"{config} is not made of boxes 128 bytes wide"
    need = gluon_shared_bytes(config, dtype)
    if need > chip.shared:
        return f"{config} needs about {need} bytes of shared memory, {chip.arch} has {chip.shared}"
    return None
