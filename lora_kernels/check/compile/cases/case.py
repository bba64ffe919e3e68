"""One kernel launch for the compile matrix, and the layer whose tensors it is made with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from lora_kernels.kernels.chip import Chip
from lora_kernels.kernels.common import Dropout
from lora_kernels.kernels.tiles import Config, rank_block
from lora_kernels.operands.dtypes import low_rank_dtype

WIDTH = 4096  # N and K
ODD = 1000  # rows that are no multiple of 16 elements: no wide loads
ROWS = (8192, 1, 64)  # training, decode, a small batch: each has tiles of its own
SHAPES = (*((M, WIDTH) for M in ROWS), (16, ODD), (ODD, ODD))
RANKS = (16, 64)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Mask = Literal["", "seed", "bits"]  # no dropout, a mask drawn from the seed, a mask kept as bits


@dataclass(frozen=True)
class Case:
    """One kernel launch: its name in the cost model, the sizes it is made with, its tiles, and ``launch()`` to make it.

    ``label`` names the variant: two cases of one kernel, label, dtype and configuration compile to the same code.
    ``Ns``: the widths of stacked projections of r ranks each, N their sum; empty where there is one.
    ``L``: slots of r ranks each that a mixed batch uses; 0 where every row has the one adapter.
    """

    kernel: str
    label: str
    M: int
    N: int
    K: int
    r: int
    dropout: Mask
    dtype: torch.dtype
    config: Config
    launch: Callable[[], object]
    Ns: tuple[int, ...] = ()
    L: int = 0


Provider = Callable[[Chip], Iterator[Case]]  # the cases of one family of kernels; repetitions are left out later


@dataclass(frozen=True)
class Layer:
    """One layer's sizes, and its tensors uninitialised: X (M,K), W (N,K), A (r,K), B (N,r) and what goes with them."""

    M: int
    N: int
    K: int
    r: int
    dropout: Mask
    dtype: torch.dtype

    @cached_property
    def X(self) -> Tensor:
        return torch.empty(self.M, self.K, dtype=self.dtype)

    @cached_property
    def dY(self) -> Tensor:
        return torch.empty(self.M, self.N, dtype=self.dtype)

    @cached_property
    def W(self) -> Tensor:
        return torch.empty(self.N, self.K, dtype=self.dtype)

    @cached_property
    def bias(self) -> Tensor:
        return torch.empty(self.N, dtype=self.dtype)

    @cached_property
    def XA(self) -> Tensor:
        """Also dYB: both are (M, r)."""
        return torch.empty(self.M, self.r, dtype=low_rank_dtype(self.dtype))

    @cached_property
    def A(self) -> Tensor:
        return torch.empty(self.r, self.K)  # float32, as PEFT keeps adapters

    @cached_property
    def B(self) -> Tensor:
        return torch.empty(self.N, self.r)

    @cached_property
    def drop(self) -> Dropout | None:
        if not self.dropout:
            return None
        bits = torch.empty(self.M, 16 * -(-self.K // 128), dtype=torch.uint8) if self.dropout == "bits" else None
        return Dropout(0.1, torch.empty(2, dtype=torch.int64), bits)

    def case(self, kernel: str, config: Config, launch: Callable[[], object], note: str = "") -> Case:
        """The case of ``kernel`` in this layer; ``note`` tells it from another of the same rank and mask."""
        notes = (note, f"dropout {self.dropout}" if self.dropout else "", "odd" if self.K % 16 or self.N % 16 else "")
        label = " ".join((f"{kernel} r={self.r}", *filter(None, notes)))
        return Case(kernel, label, self.M, self.N, self.K, self.r, self.dropout, self.dtype, config, launch)


def layers(
    dtypes: Sequence[torch.dtype] = DTYPES,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    ranks: Sequence[int] = RANKS,
    masks: Sequence[Mask] = ("", "seed", "bits"),
) -> Iterator[Layer]:
    """A layer for every dtype, (rows, width), rank and mask; ranks end at what one tile of ranks holds."""
    for dtype, (M, width), r, mask in product(dtypes, shapes, ranks, masks):
        yield Layer(M, width, width, min(r, rank_block(dtype)), mask, dtype)
