"""Every kernel in every configuration that the default choice can make: what the compile matrix compiles.

A case launches its kernel through the launcher users reach, on uninitialised tensors of a real layer's shape, so that
argument specialisation (divisibility, strides of one, absent pointers) is the one that ships. A family of kernels has a
provider of its cases; the pointer kernels' is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from lora_kernels.check.compile.cases.case import Case, Provider, layers
from lora_kernels.check.compile.cases.decode import decode_cases
from lora_kernels.check.compile.cases.gluon import gluon_cases
from lora_kernels.check.compile.cases.multi import multi_cases
from lora_kernels.check.compile.cases.sm90 import ptr_cases, tma_cases
from lora_kernels.check.compile.cases.stacked import stacked_cases
from lora_kernels.kernels.chip import CHIPS, Chip
from lora_kernels.kernels.linear.expand import expand_add_
from lora_kernels.kernels.linear.lora_linear import extend, one_pass
from lora_kernels.kernels.linear.lora_linear_bwd import da, dx_da, dyb_db
from lora_kernels.kernels.linear.shrink import shrink
from lora_kernels.kernels.tiles import (
    expand_config,
    gemm_config,
    one_pass_config,
    shrink_config,
    split_config,
    wide_loads,
)


def pointer_cases(chip: Chip) -> Iterator[Case]:
    """The cases of the kernels that reach every tensor by pointers."""
    for layer in layers():
        M, N, K, r, dtype = layer.M, layer.N, layer.K, layer.r, layer.dtype
        X, dY, W, XA, A, B, drop = layer.X, layer.dY, layer.W, layer.XA, layer.A, layer.B, layer.drop
        wide = wide_loads(X, W)
        tiles, split = gemm_config(M, N, dtype, chip, wide), split_config(M, dtype, chip, r)
        rows = shrink_config(M, dtype, chip, r, drop is not None, wide)
        single = one_pass_config(M, dtype, chip, drop is not None, wide)
        yield layer.case("shrink", rows, partial(shrink, X, A, 2.0, drop, rows))
        yield layer.case("one_pass", single, partial(one_pass, X, W, A, B, layer.bias, 2.0, drop, single))
        yield layer.case("dx_da", tiles, partial(dx_da, dY, W, XA, A, X, drop, tiles))
        yield layer.case("da", split, partial(da, XA, X, drop, A.dtype, split))
        if drop is None:
            yield layer.case("extend", tiles, partial(extend, X, W, XA, B, layer.bias, tiles))
            yield layer.case("dyb_db", split, partial(dyb_db, dY, B, XA, 2.0, split, make_dbias=True))
        else:
            patch = expand_config(M, K, dtype, chip, wide)
            yield layer.case("expand", patch, partial(expand_add_, X, XA, A, drop, patch))


PROVIDERS: tuple[Provider, ...] = (
    pointer_cases,
    tma_cases,
    ptr_cases,
    gluon_cases,
    stacked_cases,
    multi_cases,
    decode_cases,
)


def shipped_cases(arch: str) -> Iterator[Case]:
    """The cases of one architecture, for example "sm_90"; each (kernel, label, dtype, configuration) once."""
    seen: set[tuple[object, ...]] = set()
    for provider in PROVIDERS:
        for case in provider(CHIPS[arch]):
            variant = (case.kernel, case.label, case.dtype, case.config)
            if variant not in seen:
                seen.add(variant)
                yield case
