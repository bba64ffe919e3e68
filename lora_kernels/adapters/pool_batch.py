"""The with statement of pool.batch: who opened a batch, and that batches end in the order in which they began."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from lora_kernels.adapters.pool_state import PoolState
from lora_kernels.errors import AdapterPoolError, ShapeError
from lora_kernels.layers.pooled import Here
from lora_kernels.layers.pooled_batch import OpenBatch
from lora_kernels.layers.pooled_here import running
from lora_kernels.layers.pooled_ids import BatchIds

Name = str | None | tuple[str, float]
Asked = Sequence[Name] | Tensor
LARGEST = torch.finfo(torch.float32).max
OVERLAP = (
    "batches of this pool overlap: one ended while another that was opened later in the same context was open. Close "
    "them in the opposite order, or open them in tasks or threads of their own"
)


class Opening:
    """A batch for one with statement."""

    def __init__(self, here: Here, begin: Callable[[], OpenBatch], end: Callable[[OpenBatch], None]) -> None:
        self._here, self._begin, self._end = here, begin, end
        self._batch: OpenBatch | None = None

    def __enter__(self) -> None:
        if self._batch is not None:
            raise AdapterPoolError("this batch was opened before; call pool.batch again for each with statement")
        here, frame = self._here, generator_of(sys._getframe(1))
        outer: OpenBatch | None = here.get()
        if outer is not None and outer.frame is not None and not running(outer.frame):
            raise AdapterPoolError(
                "a generator that is suspended has a batch open in this context; run it to its end first, or open "
                "this batch in a thread or a task of its own"
            )
        batch = self._batch = self._begin()
        batch.frame, batch.outer = frame, _still_open(outer, "outer")
        batch.outer_in_thread = _still_open(here.thread.batch, "outer_in_thread")
        if batch.outer_in_thread is not batch.outer:  # of another task of this thread, or opened in another thread
            for other in (batch, batch.outer_in_thread):
                if other is not None:
                    other.interleaved = True
        here.var.set(batch)
        here.thread.batch = batch
        if frame is not None:
            here.generators[frame] = batch

    def __exit__(self, *_: object) -> None:
        here, batch = self._here, self._batch
        assert batch is not None
        try:
            self._end(batch)
        finally:
            batch.ended = True
            if batch.frame is not None:
                here.generators.pop(batch.frame, None)
            batch.refuse("the batch that is open in this context has ended; open one where the model is called")
            innermost: OpenBatch | None = here.get()
            if here.thread.batch is batch:
                here.thread.batch = _still_open(batch.outer_in_thread, "outer_in_thread")
            if innermost is batch:
                here.var.set(_still_open(batch.outer, "outer"))
        if innermost is not batch:
            inside = []
            while innermost is not None and innermost is not batch:
                inside.append(innermost)
                innermost = innermost.outer
            if innermost is None:
                raise AdapterPoolError("a batch ended in another thread or task than it began in; open it there")
            for other in inside:
                other.refuse(OVERLAP)
            raise AdapterPoolError(OVERLAP)


def _still_open(batch: OpenBatch | None, outer: str) -> OpenBatch | None:
    """The batch, or the first around it that has not ended."""
    while batch is not None and batch.ended:
        batch = getattr(batch, outer)
    return batch


def generator_of(frame: FrameType | None) -> FrameType | None:
    """The generator in which a with statement stands; not one that contextlib drives, which is suspended all through
    the statement that it stands for."""
    while frame is not None:
        driver = frame.f_back
        driven = driver is not None and driver.f_globals.get("__name__") == "contextlib"
        if frame.f_globals.get("__name__") != "contextlib" and not driven:
            return frame if frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR) else None
        frame = driver
    return None


def split(asked: Sequence[Name]) -> tuple[list[str | None], dict[int, float]]:
    """Names, and where a name has a scale that is not 1: from ["sql", ("fr", 0.5), None]."""
    if isinstance(asked, str) or not isinstance(asked, Sequence):
        raise AdapterPoolError(f"{asked!r:.80}: expected a list of names, one a sequence, None for no adapter")
    names, factors = list[Any](asked), dict[int, float]()
    for at, one in enumerate(names):
        if isinstance(one, tuple):
            name, factor = one if len(one) == 2 else (None, 0.0)
            number = isinstance(factor, int | float) and not isinstance(factor, bool)
            if not isinstance(name, str) or not number or not math.isfinite(factor):
                raise AdapterPoolError(f"{one!r:.80}: expected a name, None, or (name, scale) with a finite scale")
            names[at] = name
            if factor != 1:
                factors[at] = float(factor)
    return names, factors


class Wanted:
    """What a batch is asked for, with the slots that it uses: of the model's sequences and of its images."""

    def __init__(self, state: PoolState, capacity: int, device: torch.device) -> None:
        self._state, self._capacity, self._device = state, capacity, device
        self._virtual = dict[tuple[int, float], int]()
        self.held, self.live = set[int](), False

    def ids(self, asked: Asked) -> BatchIds:
        """One id a request. Raises UnknownAdapterError, AdapterPoolError, ShapeError."""
        if isinstance(asked, Tensor):
            self.live = True
            self.held |= {entry.slot for entry in self._state.entries()}
            return BatchIds(check_ids(asked), self._capacity)
        names, factors = split(asked)
        values = self._state.slots(names)
        self.held.update(values)
        for at, factor in factors.items():
            largest = self._state.held[names[at] or ""].scaling
            if not abs(factor) * largest <= LARGEST:
                raise AdapterPoolError(f"({names[at]!r}, {factor}): infinite times the adapter's scaling of {largest}")
            values[at] = self._virtual.setdefault((values[at], factor), self._capacity + len(self._virtual))
        return BatchIds(ids_tensor(values, self._device), self._capacity, named=True, values=values)

    def virtual(self) -> tuple[Tensor, Tensor] | None:
        """The slots and factors of the ids from ``capacity`` on."""
        if not self._virtual:
            return None
        with torch.inference_mode(False):
            slots, factors = zip(*self._virtual, strict=True)
            return torch.tensor(slots, device=self._device), torch.tensor(factors, device=self._device)

    def batch(self, here: Here, requests: BatchIds, images: BatchIds | None) -> OpenBatch:
        """To be opened."""
        self.held.discard(-1)
        touched = self._state.touched if self.live else self._state.touched_by(frozenset(self.held))
        return OpenBatch(here, requests, images, touched, self.held, self.virtual())


def ids_tensor(slots: list[int], device: torch.device) -> Tensor:
    """int32 (n,)."""
    with torch.inference_mode(False):  # a backward may be next
        return torch.tensor(slots, dtype=torch.int32, device="cpu").to(device)


def check_ids(ids: Tensor) -> Tensor:
    """A tensor of the caller's that a batch can read. Raises ShapeError."""
    if ids.dtype != torch.int32 or not ids.is_contiguous():
        raise ShapeError(
            f"ids are {ids.dtype}{'' if ids.is_contiguous() else ' with gaps'}; expected a contiguous torch.int32 "
            "tensor, as it is read at every layer and a converted copy would not be"
        )
    return ids
