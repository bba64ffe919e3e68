"""Slots: the adapters of one linear layer, packed for the operators of mixed batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.errors import ConfigError, ShapeError

BASE = "__base__"  # PEFT's name for no adapter, whose id is -1


class Slots(NamedTuple):
    """L adapters of one layer: slot l uses rows starts[l] .. starts[l] + ranks[l] of A and the same columns of B.

    A (R, K) and B (N, R) of any strides and float dtypes. starts int32 (L,), ranks int32 (L,) with 0 for an empty slot,
    scalings float32 (L,) are on the device, so that a captured graph stays valid when they change. ``max_rank`` is a
    number on the host: no slot has a larger rank.
    """

    A: Tensor
    B: Tensor
    starts: Tensor
    ranks: Tensor
    scalings: Tensor
    max_rank: int

    @classmethod
    def of(
        cls,
        A: Tensor | Sequence[Tensor],
        B: Tensor | Sequence[Tensor],
        ranks: Sequence[int] | Tensor | None,
        scalings: Sequence[float] | float,
    ) -> Slots:
        """Slots in the given order; gradients flow to A and B as given.

        Args:
            A: (R, K) with the adapters' rows one after another, or one (r_l, K) for each adapter.
            B: (N, R) with the adapters' columns one after another, or one (N, r_l) for each adapter.
            ranks: r_l of each adapter, with sum R; may be None for one tensor an adapter. Read on the host.
            scalings: of each adapter, or one number for all.

        Raises:
            ShapeError: shapes, dtypes or devices that do not fit together.
            ConfigError: a rank below 0, a scaling that is not finite.
        """
        if not isinstance(A, Tensor) or not isinstance(B, Tensor):
            A, B, found = _side_by_side(A, B)
            if ranks is not None and [int(r) for r in ranks] != found:
                raise ShapeError(f"ranks are {[int(r) for r in ranks]}, but the adapters have {found}; pass ranks=None")
            ranks = found
        if ranks is None:
            raise ShapeError("ranks is None beside one packed A; expected the rank of each adapter")
        rank_list = [int(r) for r in (ranks.tolist() if isinstance(ranks, Tensor) else ranks)]
        if any(r < 0 for r in rank_list):
            raise ConfigError(f"ranks are {rank_list}; accepted are 0 (an empty slot) and more")
        total = sum(rank_list)
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != total or B.shape[1] != total:
            raise ShapeError(
                f"A {tuple(A.shape)}, B {tuple(B.shape)} and ranks of {total} in all do not fit: expected "
                f"A ({total}, K) and B (N, {total})"
            )
        if isinstance(scalings, int | float):
            scalings = [scalings] * len(rank_list)
        if any(isinstance(s, Tensor) and s.requires_grad for s in scalings):
            raise ConfigError("a scaling requires a gradient, which mixed batches do not give; pass scaling.detach()")
        values = [float(s) for s in scalings]
        if len(values) != len(rank_list):
            raise ShapeError(f"{len(values)} scalings for {len(rank_list)} adapters; expected one each, or one number")
        if not all(math.isfinite(s) for s in values):
            raise ConfigError(f"scalings are {values}; expected finite numbers (lora_alpha / r)")
        starts = [sum(rank_list[:slot]) for slot in range(len(rank_list))]

        def data(numbers: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(numbers, dtype=dtype, device="cpu").to(A.device)

        return cls(
            A,
            B,
            data(starts, torch.int32),
            data(rank_list, torch.int32),
            data(values, torch.float32),
            max(rank_list, default=0),
        )


def _side_by_side(A: Tensor | Sequence[Tensor], B: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor, list[int]]:
    """Pack one tensor an adapter into A (R, K) and B (N, R), and the ranks."""
    if isinstance(A, Tensor) or isinstance(B, Tensor) or len(A) != len(B) or not len(A):
        given = [("one tensor" if isinstance(T, Tensor) else f"{len(T)} tensors") for T in (A, B)]
        raise ShapeError(f"A is {given[0]}, B {given[1]}; expected both packed, or one tensor an adapter of each")
    K, N = A[0].shape[-1], B[0].shape[0]
    for slot, (a, b) in enumerate(zip(A, B, strict=True)):
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != K or b.shape[0] != N or a.shape[0] != b.shape[1]:
            raise ShapeError(
                f"adapter {slot}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit: expected A (r, {K}) "
                f"and B ({N}, r)"
            )
        if a.dtype != A[0].dtype or b.dtype != B[0].dtype or a.device != A[0].device or b.device != A[0].device:
            raise ShapeError(
                f"adapter {slot}: A {a.dtype} on {a.device}, B {b.dtype} on {b.device}; the first has {A[0].dtype}, "
                f"{B[0].dtype} on {A[0].device}, and all must share them"
            )
    return torch.cat(tuple(A)), torch.cat(tuple(B), 1), [a.shape[0] for a in A]
