"""The adapter ids of a batch, one for each request, and slots whose scaling has a factor of the batch."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lora_kernels.errors import AdapterPoolError, ShapeError
from lora_kernels.operands.slots import Slots

Key = tuple[object, ...]


class BatchIds:
    """int32 (n,), one for each request, from -1 (no adapter) to ``limit`` - 1.

    named: the batch made ``ids`` and frees them at its end; nothing else writes into them. Otherwise the tensor belongs
    to the caller: on a CPU its values are read at each use, so every change is seen.

    ids: the values at the last reading. live: the tensor itself, for a graph. uniform: int32 (1,) if all n ids are
    equal, as far as the host can find out without waiting for a GPU; value: that id as an int; always: ``uniform``
    if it is known when the batch is made.
    """

    def __init__(self, ids: Tensor, limit: int, *, named: bool = False, values: list[int] | None = None) -> None:
        self.given, self.limit, self.named = ids, limit, named
        self.ids = self.live = ids if ids.dim() == 1 else ids.view(-1)
        self.count = self.ids.numel()
        self._place, self._bytes = 0 if named else ids.data_ptr(), b""
        self._kept: dict[Key, Tensor] = {}
        self.uniform: Tensor | None = None
        self.value: int | None = None
        self._look(values or [])
        self.always = self.uniform

    def now(self) -> dict[Key, Tensor] | None:
        """The cache of tensors computed from the current ids; None on a GPU, where changes cannot be detected."""
        if self.named:
            return self._kept
        if self.given.data_ptr() != self._place:
            raise AdapterPoolError(
                "the tensor of ids has another storage than when the batch was opened; write into it in place "
                "(pool.ids(names, out=tensor)), or open another batch"
            )
        if not self.given.is_cpu:
            return None
        content = ctypes.string_at(self._place, 4 * self.count)
        if content != self._bytes:
            self._kept.clear()
            with torch.inference_mode(False):  # autograd may save it
                self.ids = torch.frombuffer(bytearray(content or bytes(4)), dtype=torch.int32)[: self.count]
            values = self.ids.tolist()
            if values and not (min(values) >= -1 and max(values) < self.limit):
                raise ShapeError(
                    f"adapter ids go from {min(values)} to {max(values)}; accepted are -1 (no adapter) and 0 to "
                    f"{self.limit - 1}"
                )
            self._bytes = content
            self._look(values)
        return self._kept

    def _look(self, values: list[int]) -> None:
        alike = self.count == 1 or len(set(values)) == 1
        self.uniform = self.ids[:1] if alike else None
        self.value = values[0] if alike and values else None

    def repeated(self, expand: int, live: bool = False) -> Tensor:
        """int32 (n expand,): each id ``expand`` times, as generate() has repeated its request."""
        ids = self.live if live else self.ids
        return ids if expand == 1 else ids.repeat_interleave(expand)


def with_factors(slots: Slots, which: Tensor, factors: Tensor) -> Slots:
    """The slots, followed by copies of the slots ``which`` (v,) with their scaling times ``factors`` (v,)."""
    which, factors = which.to(slots.A.device), factors.to(slots.A.device)
    return slots._replace(
        starts=torch.cat([slots.starts, slots.starts[which]]),
        ranks=torch.cat([slots.ranks, slots.ranks[which]]),
        scalings=torch.cat([slots.scalings, slots.scalings[which] * factors]),
    )
