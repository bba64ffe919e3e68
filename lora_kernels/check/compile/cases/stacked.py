"""The stacked kernels and the SwiGLU ones in every configuration that the default choice can make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import torch

from lora_kernels.check.compile.cases.case import DTYPES, ODD, WIDTH, Case, Layer, Mask
from lora_kernels.kernels.chip import Chip
from lora_kernels.kernels.mlp.swiglu import TILES, swiglu, swiglu_bwd
from lora_kernels.kernels.stacked.launchers import dx_config
from lora_kernels.kernels.stacked.lora_linear_stacked import stacked_dx, stacked_extend
from lora_kernels.kernels.tiles import gemm_config, rank_block, wide_loads

TRAINING = (8192, WIDTH)
EXTEND = {TRAINING: (16, 64), (16, WIDTH): (16,), (ODD, ODD): (16,)}  # ranks of each of three projections
DX: dict[tuple[int, int], tuple[tuple[int, int, Mask], ...]] = {  # projections, ranks of each, mask
    TRAINING: ((3, 16, ""), (3, 16, "seed"), (3, 16, "bits"), (2, 16, "bits"), (1, 16, "seed"), (3, 64, "bits")),
    (16, WIDTH): ((3, 16, "bits"),),
    (ODD, ODD): ((3, 16, "bits"), (2, 16, "bits")),
}


def _widths(layer: Layer, projections: int) -> list[int]:
    """q as wide as X, k and v a quarter of it."""
    return [layer.N, layer.N // 4, layer.N // 4][:projections]


def stacked_cases(chip: Chip) -> Iterator[Case]:
    """The cases of the kernels that serve several projections, and of the activation between them."""
    for dtype, (M, width) in product(DTYPES, EXTEND):
        for r in EXTEND[M, width]:
            yield _extend(Layer(M, width, width, min(r, rank_block(dtype)), "", dtype), chip)
        for projections, r, mask in DX[M, width]:
            yield _dx(Layer(M, width, width, min(r, rank_block(dtype)), mask, dtype), projections, chip)
    for dtype in DTYPES:
        layer = Layer(*TRAINING, WIDTH, 16, "", dtype)
        yield layer.case("swiglu", TILES, partial(swiglu, layer.X, layer.X))
        yield layer.case("swiglu_bwd", TILES, partial(swiglu_bwd, layer.dY, layer.X, layer.X, True))


def _extend(layer: Layer, chip: Chip) -> Case:
    Ns, M, K, dtype = _widths(layer, 3), layer.M, layer.K, layer.dtype
    W, B = [torch.empty(N, K, dtype=dtype) for N in Ns], [torch.empty(N, layer.r) for N in Ns]
    bias = [torch.empty(Ns[0], dtype=dtype), None, None]
    XA = torch.empty(M, 3 * layer.r, dtype=layer.XA.dtype)
    tiles = gemm_config(M, sum(Ns), dtype, chip, wide_loads(layer.X, *W))
    launch = partial(stacked_extend, layer.X, W, XA, B, bias, tiles)
    return replace(layer.case("stacked_extend", tiles, launch, "3 projections"), N=sum(Ns), Ns=tuple(Ns))


def _dx(layer: Layer, projections: int, chip: Chip) -> Case:
    Ns, M, K, dtype = _widths(layer, projections), layer.M, layer.K, layer.dtype
    R, drop = projections * layer.r, layer.drop
    W, dY = [torch.empty(N, K, dtype=dtype) for N in Ns], [torch.empty(M, N, dtype=dtype) for N in Ns]
    dYB, A = torch.empty(M, R, dtype=layer.XA.dtype), torch.empty(R, K)
    tiles = dx_config(M, K, drop, dtype, chip, wide_loads(layer.X, *dY, *W))
    make_da = rank_block(dtype) >= R
    launch = partial(stacked_dx, dY, W, dYB, A, layer.X, drop, tiles, make_da=make_da)
    note = f"{projections} projections" + " dA" * make_da
    return replace(layer.case("stacked_dx", tiles, launch, note), N=sum(Ns), Ns=tuple(Ns))
