"""Every kernel in every configuration that the default choice can make: what the compile matrix compiles.

A case launches its kernel through the launcher users reach, on uninitialised tensors of a real layer's shape, so that
argument specialisation (divisibility, strides of one, absent pointers) is the one that ships.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from lora_kernels.kernels.chip import CHIPS, Chip
from lora_kernels.kernels.common import Dropout
from lora_kernels.kernels.expand import expand_add_
from lora_kernels.kernels.lora_linear import extend, one_pass
from lora_kernels.kernels.lora_linear_bwd import da, dx_da, dyb_db
from lora_kernels.kernels.shrink import shrink
from lora_kernels.kernels.sm90_linear import one_launch, tma_extend
from lora_kernels.kernels.tuning import (
    Config,
    expand_config,
    gemm_config,
    is_valid,
    one_pass_config,
    rank_block,
    shrink_config,
    split_config,
    tma_config,
    wide_loads,
)

WIDTH = 4096  # N and K
ODD = 1000  # rows that are no multiple of 16 elements: no wide loads
ROWS = (1, 64, 8192)  # decode, a small batch, training: each has tiles of its own
SHAPES = (*((M, WIDTH) for M in ROWS), (16, ODD), (ODD, ODD))
RANKS = (16, 64)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Case:
    """One kernel launch: what it is, the configuration it takes, and ``launch()`` to make it."""

    label: str
    dtype: torch.dtype
    config: Config
    launch: Callable[[], object]


def shipped_cases(arch: str) -> Iterator[Case]:
    """The cases of one architecture, for example "sm_90"; each (kernel, configuration, dtype, variant) once."""
    chip = CHIPS[arch]
    seen: set[tuple[object, ...]] = set()
    for dtype, (M, width), r in itertools.product(DTYPES, SHAPES, RANKS):
        r = min(r, rank_block(dtype))
        for dropout in (False, True):
            for kernel, config, launch in _launches(M, width, r, dtype, chip, dropout):
                variant = (kernel, config, dtype, r, dropout, width)
                if variant not in seen:
                    seen.add(variant)
                    marks = " dropout" * dropout + " odd" * (width == ODD)
                    yield Case(f"{kernel} r={r}{marks}", dtype, config, launch)


def _launches(
    M: int, width: int, r: int, dtype: torch.dtype, chip: Chip, dropout: bool
) -> Iterator[tuple[str, Config, Callable[[], object]]]:
    """(kernel, configuration, launch) of every kernel that takes part in a layer of this size."""
    N = K = width
    X, dY, W = (torch.empty(shape, dtype=dtype) for shape in ((M, K), (M, N), (N, K)))
    bias, XA = torch.empty(N, dtype=dtype), torch.empty(M, r, dtype=dtype)
    A, B = torch.empty(r, K), torch.empty(N, r)  # float32, as PEFT keeps adapters
    drop = Dropout(0.1, torch.empty(2, dtype=torch.int64)) if dropout else None
    wide = wide_loads(X, W)
    tiles, split = gemm_config(M, N, dtype, chip, wide), split_config(M, dtype, chip, r)
    rows, single = shrink_config(M, dtype, chip, r, dropout, wide), one_pass_config(M, dtype, chip, dropout, wide)
    yield "shrink", rows, partial(shrink, X, A, 2.0, drop, rows)
    yield "one_pass", single, partial(one_pass, X, W, A, B, bias, 2.0, drop, single)
    yield "dx_da", tiles, partial(dx_da, dY, W, XA, A, X, drop, tiles)
    yield "da", split, partial(da, XA, X, drop, A.dtype, split)
    if drop is None:
        yield "extend", tiles, partial(extend, X, W, XA, B, bias, tiles)
        yield "dyb_db", split, partial(dyb_db, dY, B, XA, 2.0, split, make_dbias=True)
        for rank in (r, r - 7):  # the latter is read element by element, into tiles of the same size
            boxes = tma_config(M, N, rank, dtype, chip)
            if is_valid(boxes, dtype, rank, chip) is None:
                XA, A, B, of = torch.empty(M, rank, dtype=dtype), A[:rank], torch.empty(N, rank), f" {rank} of"
                yield f"tma_extend{of}", boxes, partial(tma_extend, X, W, XA, B, bias, boxes, chip.units)
                yield f"one_launch{of}", boxes, partial(one_launch, X, W, A, B, bias, 2.0, boxes, chip.units)
    else:
        patch = expand_config(M, K, dtype, chip, wide)
        yield "expand", patch, partial(expand_add_, X, XA, A, drop, patch)
