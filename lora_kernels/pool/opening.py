"""The with statement of pool.batch: records where a batch was opened, and checks that batches are properly nested."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from lora_kernels.errors import AdapterPoolError, ShapeError
from lora_kernels.pool.active import ActiveBatch, running
from lora_kernels.pool.batch import OpenBatch
from lora_kernels.pool.ids import BatchIds
from lora_kernels.pool.state import PoolState

Name = str | None | tuple[str, float]
Asked = Sequence[Name] | Tensor
LARGEST = torch.finfo(torch.float32).max
OVERLAP = (
    "batches of this pool overlap: one ended while another that was opened later in the same context was still open. "
    "Close them in the opposite order, or open them in separate tasks or threads"
)


class Opening:
    """Context manager that opens one batch, once."""

    def __init__(self, active: ActiveBatch, begin: Callable[[], OpenBatch], end: Callable[[OpenBatch], None]) -> None:
        self._active, self._begin, self._end = active, begin, end
        self._batch: OpenBatch | None = None

    def __enter__(self) -> None:
        if self._batch is not None:
            raise AdapterPoolError("this batch was opened before; call pool.batch again for each with statement")
        active, frame = self._active, generator_of(sys._getframe(1))
        outer: OpenBatch | None = active.get()
        if outer is not None and outer.frame is not None and not running(outer.frame):
            raise AdapterPoolError(
                "a suspended generator has a batch open in this context; run the generator to its end first, or open "
                "this batch in a separate thread or task"
            )
        batch = self._batch = self._begin()
        batch.frame, batch.outer = frame, _still_open(outer, "outer")
        batch.outer_in_thread = _still_open(active.thread.batch, "outer_in_thread")
        if batch.outer_in_thread is not batch.outer:  # opened by another task or thread
            for other in (batch, batch.outer_in_thread):
                if other is not None:
                    other.interleaved = True
        active.var.set(batch)
        active.thread.batch = batch
        if frame is not None:
            active.generators[frame] = batch

    def __exit__(self, *_: object) -> None:
        active, batch = self._active, self._batch
        assert batch is not None
        try:
            self._end(batch)
        finally:
            batch.ended = True
            if batch.frame is not None:
                active.generators.pop(batch.frame, None)
            batch.refuse("the batch that is open in this context has ended; open one where the model is called")
            innermost: OpenBatch | None = active.get()
            if active.thread.batch is batch:
                active.thread.batch = _still_open(batch.outer_in_thread, "outer_in_thread")
            if innermost is batch:
                active.var.set(_still_open(batch.outer, "outer"))
        if innermost is not batch:
            inside = []
            while innermost is not None and innermost is not batch:
                inside.append(innermost)
                innermost = innermost.outer
            if innermost is None:
                raise AdapterPoolError(
                    "a batch was opened in one thread or task and ended in another thread or task; open "
                    "and close it in the same one"
                )
            for other in inside:
                other.refuse(OVERLAP)
            raise AdapterPoolError(OVERLAP)


def _still_open(batch: OpenBatch | None, outer: str) -> OpenBatch | None:
    """The batch, or the nearest enclosing batch that has not ended."""
    while batch is not None and batch.ended:
        batch = getattr(batch, outer)
    return batch


def generator_of(frame: FrameType | None) -> FrameType | None:
    """The frame of the generator that contains the with statement, or None. Generators that contextlib drives are
    skipped: they are suspended while their with statement runs."""
    while frame is not None:
        driver = frame.f_back
        driven = driver is not None and driver.f_globals.get("__name__") == "contextlib"
        if frame.f_globals.get("__name__") != "contextlib" and not driven:
            return frame if frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR) else None
        frame = driver
    return None


def split(asked: Sequence[Name]) -> tuple[list[str | None], dict[int, float]]:
    """Return the names, and {position: scale} of scales other than 1. ["sql", ("fr", 0.5), None] gives
    (["sql", "fr", None], {1: 0.5})."""
    if isinstance(asked, str) or not isinstance(asked, Sequence):
        raise AdapterPoolError(f"{asked!r:.80}: expected a list of names, one for each sequence, None for no adapter")
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
    """Collects the ids of a batch (for the model's sequences and images) and the slots that it uses."""

    def __init__(self, state: PoolState, capacity: int, device: torch.device) -> None:
        self._state, self._capacity, self._device = state, capacity, device
        self._virtual = dict[tuple[int, float], int]()
        self.held, self.live = set[int](), False

    def ids(self, asked: Asked) -> BatchIds:
        """One id for each request. Raises UnknownAdapterError, AdapterPoolError, ShapeError."""
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
                raise AdapterPoolError(
                    f"({names[at]!r}, {factor}): the product with the adapter's scaling of {largest} is infinite; give "
                    "a smaller scale"
                )
            values[at] = self._virtual.setdefault((values[at], factor), self._capacity + len(self._virtual))
        return BatchIds(ids_tensor(values, self._device), self._capacity, named=True, values=values)

    def virtual(self) -> tuple[Tensor, Tensor] | None:
        """Slots int64 (v,) and factors float32 (v,) of the ids ``capacity``, ``capacity`` + 1, ...; None if v = 0."""
        if not self._virtual:
            return None
        with torch.inference_mode(False):
            slots, factors = zip(*self._virtual, strict=True)
            return torch.tensor(slots, device=self._device), torch.tensor(factors, device=self._device)

    def batch(self, active: ActiveBatch, requests: BatchIds, images: BatchIds | None) -> OpenBatch:
        """The batch, not yet opened."""
        self.held.discard(-1)
        touched = self._state.touched if self.live else self._state.touched_by(frozenset(self.held))
        return OpenBatch(active, requests, images, touched, self.held, self.virtual())


def ids_tensor(slots: list[int], device: torch.device) -> Tensor:
    """The slots as an int32 tensor (n,) on the device."""
    if not torch.is_inference_mode_enabled():
        ids = torch.tensor(slots, dtype=torch.int32, device="cpu")
        return ids if device.type == "cpu" else ids.to(device)
    with torch.inference_mode(False):  # autograd may save it for a backward
        return ids_tensor(slots, device)


def check_ids(ids: Tensor) -> Tensor:
    """The caller's tensor of ids, if a batch can read it. Raises ShapeError otherwise."""
    if ids.dtype != torch.int32 or not ids.is_contiguous():
        raise ShapeError(
            f"ids are {ids.dtype}{'' if ids.is_contiguous() else ', not contiguous'}; expected a contiguous "
            "torch.int32 tensor. It is read at every layer, and a converted copy would not follow your changes"
        )
    return ids
