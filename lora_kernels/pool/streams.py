"""Orders writes to rows of the pool on a GPU: after the last kernel that reads them, before the next one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


class LoadOrder:
    """Runs loads on separate streams, one for each GPU, so that a load waits only for batches whose slots it writes.

    When a batch ends, an event is recorded on its stream. A load waits on the device for the events of the slots that
    it writes, and then synchronises its stream on the host, so that later launches on any stream read the new weights.
    On other devices every operation is complete when its call returns, and nothing needs to be ordered.

    ``devices``: called each time, since a model may be moved. ``cuda``: torch.cuda, or a replacement in a test.
    """

    def __init__(self, devices: Callable[[], Iterable[torch.device]], cuda: Any = torch.cuda) -> None:
        self._cuda, self._devices = cuda, devices
        self._made: dict[torch.device, Any] = {}
        self._last: defaultdict[int, list[Any]] = defaultdict(list)

    def _streams(self) -> dict[torch.device, Any]:
        """Return the load stream of each GPU that holds layers of the pool."""
        there = sorted({device for device in self._devices() if device.type == "cuda"}, key=str)
        for device in there:
            if device not in self._made:
                self._made[device] = self._cuda.Stream(device)
        return {device: self._made[device] for device in there}

    def batch_ended(self, slots: Iterable[int]) -> None:
        """Note that kernels launched so far, on the current streams, read these slots.

        Does nothing while a graph is captured, since no kernel runs; a replay must be inside of a batch.
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
        """Launch the kernels and copies of the block on the load streams, and wait for them at its end. If one of the
        ``sources`` is on a GPU, they run after the caller's earlier launches, which may compute it."""
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
        """Launch the kernels and copies of the block on the load streams, after the last use of ``slots``, and wait for
        them at its end, also if the block raises after restoring what it wrote."""
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
