import time

import pytest
import torch

from benchmarks.timing import HostClock, RehearsalClock, extra_peak_mib, interleaved
from tests.clocks import Stopwatch


def test_calls_take_turns_and_another_goes_first_each_round() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    samples = interleaved(calls, RehearsalClock(), rounds=2, warmup=1)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert samples == {name: [1.0, 1.0] for name in "abc"}


def test_the_first_round_is_not_counted_and_no_first_call_of_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Stopwatch(monkeypatch)
    # warm-up; then two calls a turn, of which the second counts; the first turn does not count
    pauses = iter([0.05, 0.05, 0.05, 0.05, 0.001, 0.05, 0.002])

    def call() -> None:
        clock.now += next(pauses)

    assert interleaved({"a": call}, HostClock(), rounds=2, warmup=1)["a"] == pytest.approx([1, 2])


def test_the_host_clock_reads_milliseconds() -> None:
    (elapsed,) = interleaved({"a": lambda: time.sleep(0.02)}, HostClock(), rounds=1, warmup=0)["a"]
    assert elapsed >= 20


def test_nothing_to_time() -> None:
    assert interleaved({}, HostClock(), rounds=2) == {}


def test_memory_of_a_cpu_is_not_counted() -> None:
    assert extra_peak_mib(lambda: None, torch.device("cpu")) is None
