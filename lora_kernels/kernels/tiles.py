"""Tile configurations: frozen, chosen by a pure function of shape, dtype and chip, checked in one place."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lora_kernels.kernels.chip import KIB, Chip
from lora_kernels.kernels.hopper.gluon_tiles import GluonConfig, gluon_shared_bytes
from lora_kernels.kernels.hopper.gluon_tiles import refusal as gluon_refusal
from lora_kernels.operands.dtypes import low_rank_dtype

RANK_BLOCK = 64  # ranks in one tile, 16 bit
DECODE_ROWS = 64  # tokens that multi_decode takes


@dataclass(frozen=True)
class GemmConfig:
    """Tiles of a product over the whole of K: rows, columns, reduction step, L2 grouping."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    GROUP_M: int = 8


@dataclass(frozen=True)
class ShrinkConfig:
    """Tiles of the pass that makes XA."""

    BLOCK_M: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class SplitConfig:
    """Tiles of a pass whose sum over M is split: one program sums SPAN_M rows, a later launch sums the spans."""

    BLOCK_M: int
    BLOCK_N: int
    SPAN_M: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class TmaConfig:
    """Tiles of a persistent product over the whole of K with TMA descriptors: one program a multiprocessor.

    FLATTEN: the tile loop and the K loop are one pipeline (not where atomics stand between them: it would be lost).
    XA_STAGES: pipeline depth of the loop that makes XA, which has the same shared memory for narrower tiles.
    RANK_STEP: the most ranks of XA and B in registers at a time.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    FLATTEN: bool = False
    XA_STAGES: int = 4
    RANK_STEP: int = 64
    GROUP_M: int = 8


@dataclass(frozen=True)
class TmaDxConfig:
    """Tiles of the persistent TMA kernel that makes dX and dA's partials: one program a multiprocessor.

    BLOCK_M x BLOCK_N of dX, BLOCK_K of the sum over N. RANK_STEP: the most ranks of dYB and A in registers at a time.
    DA_ROWS: row blocks that a program walks down one after another, adding them to one partial of dA.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    RANK_STEP: int = 32
    DA_ROWS: int = 1
    GROUP_M: int = 8


@dataclass(frozen=True)
class PtrConfig:
    """Tiles of the persistent one-launch kernel that goes by pointers: one program a multiprocessor.

    XA_STAGES: pipeline depth of the loop that makes XA. RANK_STEP: the most ranks of XA and B in registers at a time.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    XA_STAGES: int = 4
    RANK_STEP: int = 64
    GROUP_M: int = 8


# multi_decode's tasks that make XA: columns and ranks of one, whatever else is in the batch
SHRINK_K, SHRINK_RANKS = 512, 16


@dataclass(frozen=True)
class DecodeConfig:
    """Tiles of multi_decode: BLOCK_M tokens at most, BLOCK_N rows of W a tile, whose K is SPLIT among as many programs.

    LOW_N: columns of a task that multiplies XA and B. RANK_STAGES: pipeline depth of its walk over blocks of ranks.
    maxnreg: registers a thread, so that the programs wanted on a multiprocessor fit; left alone, ptxas spills for more.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    SPLIT: int = 1
    LOW_N: int = 32
    RANK_STAGES: int = 4
    maxnreg: int | None = None


Config = GemmConfig | ShrinkConfig | SplitConfig | TmaConfig | TmaDxConfig | PtrConfig | DecodeConfig | GluonConfig


def rank_block(dtype: torch.dtype) -> int:
    """The most ranks one tile holds; larger ranks are walked in blocks. fp32 dots unroll on scalar units, so there
    are few.

    float16 has as few: its low-rank operands are float32, in three parts each, and 32 ranks spill on sm_80.
    """
    return RANK_BLOCK if dtype == torch.bfloat16 else 16


def rank_tile(r: int, dtype: torch.dtype) -> int:
    """Columns a rank takes in a tile: a power of two from 16 (the narrowest matrix unit) to rank_block(dtype)."""
    return min(rank_block(dtype), max(16, 1 << (r - 1).bit_length()))


def shared_bytes(config: Config, dtype: torch.dtype, r: int) -> int:
    """Shared memory one block needs for its pipeline stages, as an upper estimate."""
    R = rank_tile(r, dtype)
    match config:
        case GemmConfig():
            tiles = config.BLOCK_K * (config.BLOCK_M + config.BLOCK_N + R)
        case ShrinkConfig():
            tiles = config.BLOCK_K * (config.BLOCK_M + R)
        case SplitConfig():
            tiles = config.BLOCK_M * (config.BLOCK_N + R)
        case TmaConfig():  # A and B may be float32; Y leaves in two halves of its columns
            ring = config.num_stages * config.BLOCK_K * (config.BLOCK_M + config.BLOCK_N) * dtype.itemsize
            ends = config.BLOCK_M * config.BLOCK_N // 2 * dtype.itemsize
            wide = 4 if min(R, config.RANK_STEP) > 32 else dtype.itemsize
            ends += R * (config.BLOCK_M * dtype.itemsize + config.BLOCK_N * wide) if config.FLATTEN else 0
            return max(ring + ends, config.XA_STAGES * config.BLOCK_K * (config.BLOCK_M * dtype.itemsize + R * 4)) + KIB
        case TmaDxConfig():  # the opening's operands, A maybe float32, are in shared memory when the ring fills
            ring = config.num_stages * config.BLOCK_K * (config.BLOCK_M + config.BLOCK_N) * dtype.itemsize
            opening = min(R, config.RANK_STEP) * (config.BLOCK_M + config.BLOCK_N) * dtype.itemsize
            return ring + opening + KIB
        case PtrConfig():  # A may be float32
            ring = config.num_stages * config.BLOCK_K * (config.BLOCK_M + config.BLOCK_N) * dtype.itemsize
            return max(ring, config.XA_STAGES * config.BLOCK_K * (config.BLOCK_M * dtype.itemsize + R * 4)) + KIB
        case DecodeConfig():  # A and B may be float32; the loops of W, A and B follow each other in one memory
            step, e = config.num_stages * config.BLOCK_K, dtype.itemsize
            low = config.RANK_STAGES * SHRINK_RANKS * (config.BLOCK_M * e + config.BLOCK_N * 4)
            return max(
                step * (config.BLOCK_M + config.BLOCK_N) * e, step * (config.BLOCK_M * e + SHRINK_RANKS * 4), low
            )
        case GluonConfig():
            return gluon_shared_bytes(config, dtype)
    return tiles * dtype.itemsize * config.num_stages


def is_valid(config: Config, dtype: torch.dtype, r: int, chip: Chip) -> str | None:
    """None where ``config`` can run on ``chip``; otherwise the reason it is refused."""
    if isinstance(config, GluonConfig):
        return gluon_refusal(config, dtype, r, chip)
    if isinstance(config, TmaConfig | TmaDxConfig) and (reason := _tma_refusal(config, dtype, r, chip)):
        return reason
    if isinstance(config, PtrConfig) and (reason := _ptr_refusal(config, dtype, r, chip)):
        return reason
    need = shared_bytes(config, dtype, r)
    if isinstance(config, TmaDxConfig) and chip.arch == "sm_90":  # half a tile of dX lies beside the ring there
        need += config.BLOCK_M * config.BLOCK_N // 2 * dtype.itemsize
    if need > chip.shared:
        return f"{config} needs about {need} bytes of shared memory, {chip.arch} has {chip.shared}"
    if isinstance(config, DecodeConfig) and (config.BLOCK_M > DECODE_ROWS or SHRINK_K % config.BLOCK_K):
        return f"{config}: BLOCK_M goes up to {DECODE_ROWS}, and BLOCK_K divides {SHRINK_K}"
    if isinstance(config, SplitConfig) and config.SPAN_M % config.BLOCK_M:
        return f"SPAN_M={config.SPAN_M} is not a multiple of BLOCK_M={config.BLOCK_M}"
    return None


def _tma_refusal(config: TmaConfig | TmaDxConfig, dtype: torch.dtype, r: int, chip: Chip) -> str | None:
    if chip.is_amd or int(chip.arch.removeprefix("sm_")) < 90:
        return f"{chip.arch} has no TMA, sm_90 and newer have"
    if dtype.itemsize != 2:
        return f"its tiles are 16-bit, not {dtype}"
    if low_rank_dtype(dtype) is not dtype:  # 128x256 beside float32 operands: 512 to 856 bytes of registers spilled
        return f"its wide tiles leave no registers for the float32 XA and dYB of {dtype}; pointer kernels have them"
    if r > RANK_BLOCK:
        return f"r={r} is above {RANK_BLOCK}, one tile of ranks"
    if isinstance(config, TmaConfig):
        flat = config.FLATTEN and chip.arch == "sm_100"
        return "a flattened tile loop does not compile for sm_100 (Triton 3.7)" if flat else None
    size, most = config.BLOCK_M * config.BLOCK_N, 128 * (256 if chip.shared >= 200 * KIB else 128)
    if chip.arch == "sm_100" and size > 128 * 128:
        return "tiles above 128x128 need 544 columns of tensor memory, sm_100 has 512"
    if size > most // (2 if _ragged(r) or (chip.shared < 200 * KIB and r > 16) else 1):
        return f"{config.BLOCK_M}x{config.BLOCK_N} tiles with r={r} spill registers on {chip.arch}"
    return None


def _ptr_refusal(config: PtrConfig, dtype: torch.dtype, r: int, chip: Chip) -> str | None:
    if chip.is_amd:
        return f"{chip.arch} has no cp.async; sm_80 and newer have"
    if chip.arch == "sm_100" and low_rank_dtype(dtype) is not dtype:
        return f"the float32 XA of {dtype} needs 528 columns of tensor memory, sm_100 has 512"
    if r > rank_block(dtype):
        return f"r={r} is above {rank_block(dtype)}, one tile of ranks"
    spared = r <= 16 or (chip.arch in ("sm_90", "sm_100") and not _ragged(r))  # wide matrix units read shared memory
    spared &= dtype.itemsize == 2 and low_rank_dtype(dtype) is dtype
    most = 128 * (256 if spared else 128)
    if most < config.BLOCK_M * config.BLOCK_N:
        return f"{config.BLOCK_M}x{config.BLOCK_N} tiles with r={r} in {dtype} spill registers on {chip.arch}"
    return None


def tma_rows(N: int, K: int, dtype: torch.dtype) -> str | None:
    """None where rows of contiguous X (M, K), W (N, K) and Y (M, N) are multiples of 16 bytes, as descriptors want."""
    for name, size in (("K", K), ("N", N)):
        if size * dtype.itemsize % 16:
            return f"rows of {name}={size} elements are not a multiple of 16 bytes"
    return None


def _ragged(r: int) -> bool:
    """Whether columns of a rank are read element by element: their addresses fill the registers of a wide tile."""
    return r > 16 and r % 16 > 0


def _rows(M: int, most: int) -> int:
    """The smallest power of two from 16 to ``most`` that covers M rows."""
    return min(most, max(16, 1 << (max(M, 1) - 1).bit_length()))


def wide_loads(*matrices: torch.Tensor) -> bool:
    """Whether Triton can prove that rows (or columns) of every matrix load 16 bytes at a time."""
    return all(1 in t.stride() and all(s == 1 or s % 16 == 0 for s in t.stride()) for t in matrices)


def gemm_config(M: int, N: int, dtype: torch.dtype, chip: Chip, wide: bool = True) -> GemmConfig:
    """Tiles of the extended GEMM (forward and dX): M rows, N columns of output.

    Without ``wide`` loads each element has an address of its own: smaller tiles keep those in registers.
    """
    if dtype == torch.float32:  # dots on scalar units: small tiles keep registers and code size down
        return GemmConfig(_rows(M, 64 if wide else 16), 64, 32, num_warps=4, num_stages=2)
    rows = _rows(M, 128)
    if not wide:
        return GemmConfig(min(rows, 64), 64, 32, num_warps=8 if rows >= 64 else 4, num_stages=2)
    if chip.is_amd:
        return GemmConfig(rows, 128 if rows == 128 else 64, 32, num_warps=8 if rows == 128 else 4, num_stages=2)
    if rows < 128 or N <= 64:
        return GemmConfig(min(rows, 64), 64, 64, num_warps=8 if rows >= 64 else 4, num_stages=3)
    if chip.shared < 128 * KIB:  # two stages of 64 columns are one buffer: nothing under way beside it
        # dA's product of a float16 layer takes float32 tiles in shared memory: 128 KiB for 128 columns
        return GemmConfig(128, 64 if dtype == torch.float16 else 128, 32, num_warps=8, num_stages=4)
    return GemmConfig(128, 128, 64, num_warps=8, num_stages=3)


def expand_config(M: int, N: int, dtype: torch.dtype, chip: Chip, wide: bool = True) -> GemmConfig:
    """Tiles of the expand pass: those of the GEMM, shorter where each element of dX has an address of its own."""
    tiles = gemm_config(M, N, dtype, chip, wide)
    if wide:
        return replace(tiles, num_warps=8) if tiles.BLOCK_M == 16 and dtype.itemsize == 2 else tiles
    return replace(tiles, BLOCK_M=min(tiles.BLOCK_M, 32), num_warps=4)


def one_pass_config(M: int, dtype: torch.dtype, chip: Chip, dropout: bool, wide: bool = True) -> GemmConfig:
    """Tiles of one_pass, which serves few rows or narrow N; a mask drawn in the K loop wants a short step."""
    if dtype == torch.float32:
        rows = _rows(M, 16 if dropout and not wide else 32)
        return GemmConfig(rows, 64, 32, num_warps=8 if dropout and wide else 4, num_stages=3)
    step = 32 if dropout or chip.is_amd or not wide else 64
    rows = _rows(M, 32 if dropout and not wide else 64)
    eight = (dropout and rows == 64 and chip.arch == "sm_100") or (dtype == torch.float16 and rows >= 32)
    warps = 8 if eight else 4  # 4 spill there in float16, whose XA and A are float32
    return GemmConfig(rows, 64, step, num_warps=warps, num_stages=3 if wide and not chip.is_amd else 2)


def shrink_config(M: int, dtype: torch.dtype, chip: Chip, r: int, dropout: bool, wide: bool = True) -> ShrinkConfig:
    """Tiles of the shrink pass: enough row blocks to fill the chip, long reads along K where loads are ``wide``."""
    if dtype == torch.float32:
        return ShrinkConfig(_rows(M, 32), 64 if wide else 32, num_warps=4 if wide else 8, num_stages=2)
    rows = _rows(-(-M // chip.units), 64)
    stages = 2 if dropout or chip.is_amd else 3
    if not wide:
        return ShrinkConfig(rows, 32, num_warps=8, num_stages=2)
    wide_low = dtype == torch.float16  # float32 operands: X and A take twice as many registers
    long = not dropout and not wide_low and r <= 32 and rank_tile(r, dtype) <= rows  # 64 ranks at 128 columns spill
    warps = 8 if wide_low and chip.arch in ("sm_100", "sm_120") else 4  # 4 spill 3 to 15 registers there
    return ShrinkConfig(rows, 128 if long else 64, num_warps=warps, num_stages=stages)


def split_config(M: int, dtype: torch.dtype, chip: Chip, r: int) -> SplitConfig:
    """Tiles of the passes over dY (dYB and dB) and over X (dA)."""
    span = 512 if M >= 4096 else 256
    if dtype == torch.float32:
        return SplitConfig(32, 32, span, num_warps=4, num_stages=1)
    if dtype == torch.float16:  # its dots take float32 tiles, in three parts: half the rows, or they spill
        return SplitConfig(32, 64, span, num_warps=4, num_stages=2)
    wide = 128 if r <= 32 and not chip.is_amd else 64
    return SplitConfig(
        64, wide, span, num_warps=4 if chip.is_amd else 8, num_stages=2
    )  # 4 warps spill on sm_80, sm_120


def tma_config(M: int, N: int, r: int, dtype: torch.dtype, chip: Chip) -> TmaConfig:
    """Tiles of the persistent TMA kernels: 128x256 where that gives every multiprocessor a tile, else 128x128.

    Up to 64 rows it is W that is read: narrow tiles, many of them, in a deep ring.
    """
    R = rank_tile(r, dtype)
    ragged = _ragged(r)
    if chip.shared < 200 * KIB:  # sm_120
        if M <= 64:
            return TmaConfig(64, 64, 64, num_warps=8, num_stages=5, XA_STAGES=4)
        return TmaConfig(128, 64 if ragged else 128, 32, num_warps=8, num_stages=5)
    if M <= 64:
        if chip.arch == "sm_90":
            return TmaConfig(64, 64, 64, num_warps=8, num_stages=8, RANK_STEP=32)
        return TmaConfig(64, 128, 64, num_warps=8, num_stages=6)
    deep, wide_tiles = 8 if R <= 32 else 6, -(-M // 128) * -(-N // 256)
    flat = chip.arch == "sm_90"
    step = 32 if flat else 64
    if wide_tiles < chip.units or ragged:
        return TmaConfig(128, 128, 64, num_warps=8, num_stages=4, FLATTEN=flat, XA_STAGES=deep, RANK_STEP=step)
    return TmaConfig(128, 256, 64, num_warps=8, num_stages=3, FLATTEN=flat, XA_STAGES=deep, RANK_STEP=step)


def tma_dx_config(M: int, K: int, r: int, dtype: torch.dtype, chip: Chip) -> TmaDxConfig:
    """Tiles of tma_dx, M rows and K columns of dX: the largest that do not spill, smaller where they are too few.

    DA_ROWS is the most at which no program makes more tiles than with 1: as few partials of dA as cost no time.
    """
    tiles = _tma_dx_tiles(M, K, r, chip)
    num_m, num_k = -(-M // tiles.BLOCK_M), -(-K // tiles.BLOCK_N)

    def longest(rows: int) -> int:
        return -(-(-(-num_m // rows) * num_k) // chip.units) * rows

    return replace(tiles, DA_ROWS=max(rows for rows in (1, 2, 4, 8) if longest(rows) <= longest(1)))


def _tma_dx_tiles(M: int, K: int, r: int, chip: Chip) -> TmaDxConfig:
    scattered = K % 16 > 0 or _ragged(r)  # rows of A and of dA's partials, or of dYB, element by element
    if M <= 64:
        stages, step = (5, 16) if chip.shared < 200 * KIB else (8, 32 if chip.arch == "sm_90" else 64)
        return TmaDxConfig(64, 64, 64, num_warps=8, num_stages=stages, RANK_STEP=step)
    if chip.shared < 200 * KIB:  # sm_120
        if scattered:
            return TmaDxConfig(64, 64, 32, num_warps=8, num_stages=5, RANK_STEP=16)
        return TmaDxConfig(128, 128 if r <= 16 else 64, 32, num_warps=8, num_stages=5)
    if chip.arch != "sm_90":
        return TmaDxConfig(128, 64 if scattered else 128, 64, num_warps=8, num_stages=4, RANK_STEP=64)
    wide_tiles = -(-M // 128) * -(-K // 256)
    if scattered or wide_tiles < chip.units:
        return TmaDxConfig(128, 128, 64, num_warps=8, num_stages=4, RANK_STEP=16 if scattered else 32)
    return TmaDxConfig(128, 256, 64, num_warps=8, num_stages=3, RANK_STEP=64)


def ptr_one_launch_config(M: int, N: int, r: int, dtype: torch.dtype, chip: Chip, wide: bool = True) -> PtrConfig:
    """Tiles of ptr_one_launch: the largest that do not spill, smaller for few rows and without ``wide`` loads."""
    rows = _rows(M, 64)
    if dtype == torch.float32:
        return PtrConfig(rows if wide else min(rows, 32), 64, 32, 4 if wide else 8, num_stages=2, XA_STAGES=2)
    warps = 8 if rows == 64 else 4
    if not wide:
        return PtrConfig(rows, 64, 32, num_warps=warps, num_stages=2, XA_STAGES=2, RANK_STEP=16)
    if M <= 64 or N <= 64:
        return PtrConfig(rows, 64, 64, num_warps=warps, num_stages=3)
    tiles = -(-M // 128) * -(-N // 256)
    wide_low = low_rank_dtype(dtype) is not dtype  # float32 XA and B
    many = tiles >= chip.units and not wide_low and N % 16 == 0  # storing rows of Y element by element spills, too
    if chip.arch == "sm_90" and many and not _ragged(r):
        return PtrConfig(128, 256, 64, num_warps=8, num_stages=3, XA_STAGES=6, RANK_STEP=32)
    if chip.arch == "sm_80" and many and r <= 16:
        return PtrConfig(128, 256, 32, num_warps=8, num_stages=4, XA_STAGES=6)
    if chip.shared < 128 * KIB:
        return PtrConfig(128, 128, 32, num_warps=8, num_stages=4, XA_STAGES=6)
    step = 16 if wide_low else 32 if chip.arch == "sm_90" else 64
    return PtrConfig(128, 128, 64, num_warps=8, num_stages=4, RANK_STEP=step)
