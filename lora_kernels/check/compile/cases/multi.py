"""The kernels for mixed batches in every configuration that the default choice can make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from lora_kernels.check.compile.cases.case import ODD, WIDTH, Case, Layer
from lora_kernels.kernels.chip import Chip
from lora_kernels.kernels.multi.extend import multi_expand_add_, multi_extend
from lora_kernels.kernels.multi.grads import multi_grads
from lora_kernels.kernels.multi.shrink import multi_shrink
from lora_kernels.kernels.multi.tiles import (
    multi_expand_config,
    multi_extend_config,
    multi_grads_config,
    multi_shrink_config,
)
from lora_kernels.kernels.tiles import wide_loads
from lora_kernels.operands.dtypes import low_rank_dtype
from lora_kernels.operands.slots import Slots

SLOTS = 8  # in the batch of a case; how many there are reaches no code
LONG, FEW, UNEVEN = (8192, WIDTH), (16, WIDTH), (ODD, ODD)  # rows, N and K
SIZES = {  # and the rank of every slot
    torch.bfloat16: ((LONG, 16), (LONG, 64), (FEW, 16), (UNEVEN, 16)),
    torch.float16: ((LONG, 16), (LONG, 64)),
    torch.float32: ((LONG, 16), (FEW, 16), (UNEVEN, 16)),
}
SPANS = {8192: 4, ODD: 1}  # of rows in the sums


@dataclass(frozen=True)
class _Mix:
    """A layer's slots and ids, uninitialised: packed float32 adapters as training has them, or a pool's."""

    layer: Layer

    def slots(self, pool: bool) -> Slots:
        """L adapters of the layer's rank; those of a ``pool`` have B transposed."""
        layer, R = self.layer, SLOTS * self.layer.r
        dtype = low_rank_dtype(layer.dtype) if pool else torch.float32
        B = torch.empty(R, layer.N, dtype=dtype).t() if pool else torch.empty(layer.N, R, dtype=dtype)
        starts, ranks = torch.empty(2, SLOTS, dtype=torch.int32)
        return Slots(torch.empty(R, layer.K, dtype=dtype), B, starts, ranks, torch.empty(SLOTS), layer.r)

    @cached_property
    def XA(self) -> Tensor:
        return torch.empty(self.layer.M, self.layer.r, dtype=low_rank_dtype(self.layer.dtype))

    @cached_property
    def ids(self) -> Tensor:
        return torch.empty(self.layer.M, dtype=torch.int32)


def multi_cases(chip: Chip) -> Iterator[Case]:
    """The cases of the kernels for mixed batches: what a pool serves, and the step that trains packed adapters."""
    for dtype, sizes in SIZES.items():
        for (M, width), r in sizes:
            mix = _Mix(Layer(M, width, width, r, "", dtype))
            for case in (*_serving(mix, chip), *_training(mix, chip)):
                yield replace(case, L=SLOTS)


def _serving(mix: _Mix, chip: Chip) -> Iterator[Case]:
    layer, ids, slots = mix.layer, mix.ids, mix.slots(pool=True)
    M, N, r, dtype, X, W, XA = layer.M, layer.N, layer.r, layer.dtype, layer.X, layer.W, mix.XA
    rows = multi_shrink_config(M, dtype, chip, r, wide_loads(X, slots.A))
    tiles = multi_extend_config(M, N, dtype, chip, r, wide_loads(X, W, slots.B))
    patch = multi_expand_config(M, N, dtype, chip, r, wide_loads(layer.dY, slots.B))
    yield layer.case("multi_shrink", rows, partial(multi_shrink, X, slots.A, slots, ids, rows), "pool")
    extend = partial(multi_extend, X, W, XA, slots.B, slots, ids, layer.bias, tiles)
    yield layer.case("multi_extend", tiles, extend, "pool")
    expand = partial(multi_expand_add_, layer.dY, XA, slots.B, slots, ids, patch)
    yield layer.case("multi_expand", patch, expand, "pool")


def _training(mix: _Mix, chip: Chip) -> Iterator[Case]:
    """The backward: B by its columns in the shrink pass, W^T and A^T in the product, several spans in the sums."""
    layer, ids, slots = mix.layer, mix.ids, mix.slots(pool=False)
    M, K, r, dtype, dY, XA = layer.M, layer.K, layer.r, layer.dtype, layer.dY, mix.XA
    Bt, At, Wt = slots.B.t(), slots.A.t(), layer.W.t()
    rows = multi_shrink_config(M, dtype, chip, r, wide_loads(dY, Bt))
    tiles = multi_extend_config(M, K, dtype, chip, r, wide_loads(dY, Wt, At))
    yield layer.case("multi_shrink", rows, partial(multi_shrink, dY, Bt, slots, ids, rows), "packed B")
    extend = partial(multi_extend, dY, Wt, XA, At, slots, ids, None, tiles)
    yield layer.case("multi_extend", tiles, extend, "dX")
    if M > 16:  # the sums know no M
        spans, split = SPANS[M], multi_grads_config(M, dtype, chip, r)
        grads = partial(multi_grads, dY, layer.X, XA, XA, slots, ids, split, spans)
        yield layer.case("multi_grads", split, grads, f"{spans} spans" if spans > 1 else "")
