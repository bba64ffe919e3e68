"""multi_decode in every configuration that the default choice can make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import torch

from lora_kernels.check.compile.cases.case import DTYPES, ODD, WIDTH, Case, Layer
from lora_kernels.kernels.chip import Chip
from lora_kernels.kernels.multi.decode import multi_decode
from lora_kernels.kernels.multi.tiles import multi_decode_config
from lora_kernels.kernels.tiles import wide_loads
from lora_kernels.operands.dtypes import low_rank_dtype
from lora_kernels.operands.slots import Slots

SLOTS, RANK = 8, 16  # of a case; neither reaches the code
TOKENS = (1, 16, 32, 64)
LAYERS = ((WIDTH, WIDTH), (14336, WIDTH), (1024, WIDTH))  # N, K: K in a few shares, whole, and in the most


def decode_cases(chip: Chip) -> Iterator[Case]:
    """The cases of the one-launch kernel for mixed batches: adapters of a pool, and packed in float32."""
    for dtype, M in product(DTYPES, TOKENS):
        for N, K in LAYERS if dtype == torch.bfloat16 else LAYERS[:1]:
            yield _case(Layer(M, N, K, RANK, "", dtype), True, chip)
        yield _case(Layer(M, WIDTH, WIDTH, RANK, "", dtype), False, chip)
        yield _case(Layer(M, ODD, ODD, RANK, "", dtype), False, chip)


def _case(layer: Layer, pool: bool, chip: Chip) -> Case:
    M, N, K, R, X, W = layer.M, layer.N, layer.K, SLOTS * layer.r, layer.X, layer.W
    dtype = low_rank_dtype(layer.dtype) if pool else torch.float32
    A = torch.empty(R, K, dtype=dtype)
    B = torch.empty(R, N, dtype=dtype).t() if pool else torch.empty(N, R, dtype=dtype)
    starts, ranks = torch.empty(2, SLOTS, dtype=torch.int32)
    slots, ids = Slots(A, B, starts, ranks, torch.empty(SLOTS), layer.r), torch.empty(M, dtype=torch.int32)
    config = multi_decode_config(M, N, K, layer.dtype, chip, wide_loads(X, W, A))
    launch = partial(multi_decode, X, W, slots, ids, layer.bias, config, chip.units)
    return replace(layer.case("multi_decode", config, launch, "pool" if pool else "packed"), L=SLOTS)
