"""The Gluon kernels in every configuration that the default choice can make."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from lora_kernels.check.compile.cases.case import ODD, WIDTH, Case, Layer, layers
from lora_kernels.kernels.chip import Chip
from lora_kernels.kernels.hopper.gluon import gluon_extend, gluon_one_launch
from lora_kernels.kernels.hopper.gluon_bwd import gluon_dx
from lora_kernels.kernels.hopper.gluon_tiles import gluon_config, refusal

DTYPES = (torch.bfloat16,)  # float16 is refused
SIZES = (((8192, WIDTH), (16, 32, 64)), ((ODD, ODD), (9, 64)), ((1, WIDTH), (16,)))  # (rows, width), ranks


def gluon_cases(chip: Chip) -> Iterator[Case]:
    """The cases of the Gluon kernels; none but on Hopper.

    Sizes and ranks reach the code as tile shapes, as 1 or not and as multiples of 16 or not: three layers have it all.
    """
    for shape, ranks in SIZES:
        yield from _of_layers(chip, layers(DTYPES, (shape,), ranks, ("", "bits")))


def _of_layers(chip: Chip, sizes: Iterator[Layer]) -> Iterator[Case]:
    for layer in sizes:
        config = gluon_config(layer.M, layer.N, layer.r, layer.dtype, chip)
        if refusal(config, layer.dtype, layer.r, chip) is not None:
            continue
        X, W, XA, A, B, bias, drop, units = (
            layer.X, layer.W, layer.XA, layer.A, layer.B, layer.bias, layer.drop, chip.units,
        )  # fmt: skip
        yield layer.case("gluon_dx", config, partial(gluon_dx, layer.dY, W, XA, A, X, drop, config, units))
        if drop is not None:
            continue
        yield layer.case("gluon_extend", config, partial(gluon_extend, X, W, XA, B, bias, config, units))
        yield layer.case("gluon_one_launch", config, partial(gluon_one_launch, X, W, A, B, bias, 2.0, config, units))
        if layer.r == 16:
            bare = partial(gluon_extend, X, W, XA, B, None, config, units)
            yield layer.case("gluon_extend", config, bare, "no bias")
            alone = partial(gluon_dx, layer.dY, W, XA, A, X, None, config, units, make_da=False)
            yield layer.case("gluon_dx", config, alone, "no dA")
