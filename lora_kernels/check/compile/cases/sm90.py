"""The TMA kernels and the one-launch kernel by pointers, in every configuration that the default choice can make."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from lora_kernels.check.compile.cases.case import DTYPES, SHAPES, Case, layers
from lora_kernels.kernels.chip import Chip
from lora_kernels.kernels.hopper.tma import one_launch, tma_extend
from lora_kernels.kernels.hopper.tma_bwd import tma_dx
from lora_kernels.kernels.linear.one_launch import ptr_one_launch
from lora_kernels.kernels.tiles import is_valid, ptr_one_launch_config, tma_config, tma_dx_config, wide_loads

RANKS = (16, 64, 57)  # the last is read element by element, into tiles of its own
HALF = (torch.bfloat16,)  # float16 is refused


def tma_cases(chip: Chip) -> Iterator[Case]:
    """The cases of the TMA kernels; none where the chip has no descriptors."""
    units = chip.units
    for layer in layers(HALF, SHAPES, (*RANKS, 9), masks=("", "bits")):
        M, N, K, r, dtype, drop = layer.M, layer.N, layer.K, layer.r, layer.dtype, layer.drop
        X, W, XA, A, B, bias = layer.X, layer.W, layer.XA, layer.A, layer.B, layer.bias
        if is_valid(config := tma_config(M, N, r, dtype, chip), dtype, r, chip) is not None:
            continue
        if drop is None:
            yield layer.case("tma_extend", config, partial(tma_extend, X, W, XA, B, bias, config, units))
            yield layer.case("one_launch", config, partial(one_launch, X, W, A, B, bias, 2.0, config, units))
        if r in RANKS:
            dx = tma_dx_config(M, K, r, dtype, chip)
            yield layer.case("tma_dx", dx, partial(tma_dx, layer.dY, W, XA, A, X, drop, dx, units))


def ptr_cases(chip: Chip) -> Iterator[Case]:
    """The cases of the one-launch kernel by pointers; none on AMD."""
    for layer in layers(DTYPES, SHAPES, RANKS, masks=("",)):
        X, W = layer.X, layer.W
        config = ptr_one_launch_config(layer.M, layer.N, layer.r, layer.dtype, chip, wide_loads(X, W))
        if is_valid(config, layer.dtype, layer.r, chip) is None:
            launch = partial(ptr_one_launch, X, W, layer.A, layer.B, layer.bias, 2.0, config, chip.units)
            yield layer.case("ptr_one_launch", config, launch)
