"""Describes the input of a server's linear layer: a batch, the adapters, and the adapter of each row."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lora_kernels.errors import ConfigError
from lora_kernels.testing.multi import DISTRIBUTIONS, MultiProblem, make_multi_problem, mix_ids

DECODE_ROWS = 64  # a batch of at most so many rows is a decoding step: one token per sequence
MIXED_RANKS = 8  # number of different ranks that "8-64" gives


@dataclass(frozen=True)
class ServingCase:
    """W (N, K) under M rows in sequences of ``sequence`` rows; slot l has rank ``ranks[l]``.

    ``distribution``: which sequences use which slot, one of lora_kernels.testing.multi.DISTRIBUTIONS.
    """

    M: int
    N: int
    K: int
    ranks: tuple[int, ...]
    distribution: str = "uniform"
    sequence: int = 1
    dtype: torch.dtype = torch.bfloat16
    bias: bool = False

    @property
    def L(self) -> int:
        """Number of slots."""
        return len(self.ranks)

    @property
    def phase(self) -> str:
        """Either "decode" or "prefill"."""
        return "decode" if self.M <= DECODE_ROWS else "prefill"

    @property
    def ranks_shown(self) -> str:
        """The ranks as text: "16", or "8-64" for several."""
        low, high = min(self.ranks), max(self.ranks)
        return str(low) if low == high else f"{low}-{high}"

    @cached_property
    def ids(self) -> Tensor:
        """int32 (M,) on the CPU: the slot of each row."""
        return mix_ids(self.distribution, self.M, self.L, run=self.sequence)

    @cached_property
    def rows_of(self) -> Counter[int]:
        """Number of rows per used slot, without the rows that have no adapter."""
        return Counter(slot for slot in self.ids.tolist() if slot >= 0)

    @property
    def flop(self) -> int:
        """Floating-point operations of the products, with the ranks of the adapters."""
        low = sum(rows * self.ranks[slot] for slot, rows in self.rows_of.items())
        return 2 * self.M * self.N * self.K + 2 * low * (self.N + self.K)

    @property
    def bytes(self) -> int:
        """Bytes of W, X, Y, and of A and B of every adapter in the batch, each counted once."""
        return self.dtype.itemsize * (self.N * self.K + self.M * (self.N + self.K) + self._adapters)

    @property
    def floor(self) -> float:
        """Bytes of W and of the batch's adapters, divided by those of W: the lower bound of a decode's ratio."""
        return 1 + self._adapters / (self.N * self.K)

    @property
    def _adapters(self) -> int:
        return sum(self.ranks[slot] for slot in self.rows_of) * (self.N + self.K)

    def problem(self, device: torch.device | str = "cpu") -> MultiProblem:
        """Return the operands in a pool's layout, with each LoRA term as large as the base term."""
        ids = self.ids.to(device)
        return make_multi_problem(ids, self.N, self.K, self.ranks, self.dtype, bias=self.bias, pool_layout=True)

    def __str__(self) -> str:
        batch = f"M{self.M}" + (f" in {self.sequence}s" if self.sequence > 1 else "")
        name = str(self.dtype).removeprefix("torch.")
        return f"{batch} N{self.N} K{self.K} L{self.L} r{self.ranks_shown} {self.distribution} {name}"


def ranks_from(text: str, L: int) -> tuple[int, ...]:
    """Return the ranks of L slots: "16" for all, "8,16,64" in turn, "8-64" for eight evenly spaced ones in turn.

    Raises:
        ConfigError: ``text`` has another form.
    """
    if match := re.fullmatch(r"([1-9]\d*)-([1-9]\d*)", text):
        low, high = int(match[1]), int(match[2])
        given: Sequence[int] = [low + round(i * (high - low) / (MIXED_RANKS - 1)) for i in range(MIXED_RANKS)]
    elif re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        given = [int(part) for part in text.split(",")]
    else:
        raise ConfigError(f"ranks {text!r}; accepted are 16 (all alike), 8,16,64 (in turn) or 8-64 (mixed)")
    return tuple(given[slot % len(given)] for slot in range(L))


def check_distribution(name: str) -> str:
    """Return the name. Raise ConfigError with the accepted names if it is unknown."""
    if name not in DISTRIBUTIONS:
        raise ConfigError(f"distribution {name!r}; accepted are {', '.join(DISTRIBUTIONS)}")
    return name
