"""Clocks, and calls timed in turns.

Turns (A B C, B C A, ...) let drifting clocks, power and temperature fall on every contender alike; what is reported is
the median with the 20th and 80th percentile (spread of lora_kernels.tuning.measure). Warm-up calls and the first
round are not counted. The L2 cache holds nothing of the operands when a GPU call starts: a buffer larger than it is
read in between (read, not written: dirty lines would be written back during the measured call).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

Call = Callable[[], object]

MIB = 1 << 20


class Clock(Protocol):
    """Times the calls of one round, in milliseconds, handed out when the round ends."""

    def start_round(self) -> None: ...

    def time(self, call: Call) -> None: ...

    def end_round(self) -> list[float]: ...


class CudaClock:
    """GPU time between two events around a call, with the host's own time hidden: the GPU idles until all is queued."""

    def __init__(self, device: torch.device) -> None:
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self._sweep = torch.ones(max(4 * l2, 256 * MIB) // 4, device=device)
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._queueing = 0.0  # seconds the host took to queue the last round
        self._started = 0.0

    def start_round(self) -> None:
        torch.cuda.synchronize()
        torch.cuda._sleep(int(1.5 * self._queueing * 2e9))  # cycles, at no more than 2 GHz
        self._started = time.perf_counter()

    def time(self, call: Call) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._sweep.sum()
        start.record()
        call()
        end.record()
        self._events.append((start, end))

    def end_round(self) -> list[float]:
        self._queueing = min(0.05, time.perf_counter() - self._started)
        torch.cuda.synchronize()
        elapsed = [start.elapsed_time(end) for start, end in self._events]
        self._events.clear()
        return elapsed


class HostClock:
    """Wall-clock time of synchronous calls on a CPU, each in the state that a call of its own has left.

    One call goes uncounted before each that counts: what the caches hold, and whether memory is fresh from the system,
    is the contender's own doing, as in a process of its own. Otherwise one with large temporaries (a merge, gathered
    weights) slows down whoever comes next: float32, 64 x 768 x 768, F.linear 0.60 ms instead of 0.46.
    """

    def __init__(self) -> None:
        self._elapsed: list[float] = []

    def start_round(self) -> None:
        self._elapsed = []

    def time(self, call: Call) -> None:
        call()
        started = time.perf_counter()
        call()
        self._elapsed.append(1e3 * (time.perf_counter() - started))

    def end_round(self) -> list[float]:
        return self._elapsed


class RehearsalClock:
    """Makes every call and reports one millisecond for it: a rehearsal's figures must look like what they are."""

    def __init__(self) -> None:
        self._calls = 0

    def start_round(self) -> None:
        self._calls = 0

    def time(self, call: Call) -> None:
        call()
        self._calls += 1

    def end_round(self) -> list[float]:
        return [1.0] * self._calls


def interleaved(calls: Mapping[str, Call], clock: Clock, rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Milliseconds of each call, ``rounds`` of them, taken in turns; who goes first changes from round to round."""
    for call in calls.values():
        for _ in range(warmup):
            call()
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names) if names else 0
        order = names[first:] + names[:first]
        clock.start_round()
        for name in order:
            clock.time(calls[name])
        for name, elapsed in zip(order, clock.end_round(), strict=True):
            if number > 0:
                samples[name].append(elapsed)
    return samples


def extra_peak_mib(call: Call, device: torch.device) -> float | None:
    """MiB that one call holds at its peak beyond what was allocated before it; None on a CPU, where nobody counts."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB
