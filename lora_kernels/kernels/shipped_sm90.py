"""The TMA kernels in every configuration that the default choice can make."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from lora_kernels.kernels.chip import Chip
from lora_kernels.kernels.shipped_case import SHAPES, Case, layers
from lora_kernels.kernels.sm90_linear import one_launch, tma_extend
from lora_kernels.kernels.tuning import is_valid, tma_config

RANKS = (16, 64, 9, 57)  # the last two are read element by element, into tiles of the same size
DTYPES = (torch.bfloat16, torch.float16)


def tma_cases(chip: Chip) -> Iterator[Case]:
    """The cases of the TMA kernels; none where the chip has no descriptors."""
    for layer in layers(DTYPES, SHAPES, RANKS, masks=("",)):
        config = tma_config(layer.M, layer.N, layer.r, layer.dtype, chip)
        if is_valid(config, layer.dtype, layer.r, chip) is not None:
            continue
        X, W, A, B, bias, units = layer.X, layer.W, layer.A, layer.B, layer.bias, chip.units
        yield layer.case("tma_extend", config, partial(tma_extend, X, W, layer.XA, B, bias, config, units))
        yield layer.case("one_launch", config, partial(one_launch, X, W, A, B, bias, 2.0, config, units))
