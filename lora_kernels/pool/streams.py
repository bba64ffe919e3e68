"""When rows of the pool may be written on a GPU: after the last kernel that reads them, before the next one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


class LoadOrder:
    """Loads run on streams of their own, one a GPU, so that they wait for no batch but those whose slots they take.

    A batch leaves an event on the stream it ran on when it ends; a load waits, on the device, for the events of the
    slots that it writes, and on the host for itself: whatever is launched later, on any stream, finds the new weights.
    Elsewhere than on CUDA, where every operation is done when its call returns, nothing is done.

    ``devices``: asked at each call, as a model may be moved. ``cuda``: torch.cuda, or what stands for it in a test.
    """

    def __init__(self, devices: Callable[[], Iterable[torch.device]], cuda: Any = torch.cuda) -> None:
        self._cuda, self._devices = cuda, devices
        self._made: dict[torch.device, Any] = {}
        self._last: defaultdict[int, list[Any]] = defaultdict(list)

    def _streams(self) -> dict[torch.device, Any]:
        """The load stream of each GPU that the pool is on."""
        there = sorted({device for device in self._devices() if device.type == "cuda"}, key=str)
        for device in there:
            if device not in self._made:
                self._made[device] = self._cuda.Stream(device)
        return {device: self._made[device] for device in there}

    def batch_ended(self, slots: Iterable[int]) -> None:
        """Note that kernels launched so far, on the current streams, read these slots.

        While a graph is captured nothing runs; its replays belong into batches of their own.
        """
        events = []
        for device in self._streams():
            stream = self._cuda.current_stream(device)
            with self._cuda.stream(stream):
                if not self._cuda.is_current_stream_capturing():
                    events.append(stream.record_event())
        if events:
            for slot in slots:
                self._last[slot] = [event for event in self._last[slot] if not event.query()] + events

    @contextmanager
    def converting(self, sources: Iterable[torch.Tensor]) -> Iterator[None]:
        """Kernels and copies of the block are launched on the load streams, and are done when it ends. Where one of
        the ``sources`` is on a GPU they come after what the caller has launched, which may have made it."""
        made_there = any(source.device.type == "cuda" for source in sources)
        streams = self._streams()
        with ExitStack() as stack:
            for device, stream in streams.items():
                if made_there:
                    stream.wait_stream(self._cuda.current_stream(device))
                stack.enter_context(self._cuda.stream(stream))
            yield
            for stream in streams.values():
                stream.synchronize()

    @contextmanager
    def writing(self, slots: Collection[int]) -> Iterator[None]:
        """Kernels and copies of the block are launched on the load streams, after the last use of ``slots``, and are
        done when it ends, also where it raises and puts back what it has written."""
        streams = self._streams()
        with ExitStack() as stack:
            for stream in streams.values():
                stack.enter_context(self._cuda.stream(stream))
                for slot in slots:
                    for event in self._last[slot]:
                        stream.wait_event(event)
            try:
                yield
            finally:
                for stream in streams.values():
                    stream.synchronize()
        for slot in slots:
            self._last.pop(slot, None)
