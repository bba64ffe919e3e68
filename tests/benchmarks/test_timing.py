import time

import pytest
import torch

from benchmarks.timing import HostClock, RehearsalClock, captured, extra_peak_mib, interleaved, spread


def test_calls_take_turns_and_another_goes_first_each_round() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    samples = interleaved(calls, RehearsalClock(), rounds=2, warmup=1)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert samples == {name: [1.0, 1.0] for name in "abc"}


def test_the_first_round_is_not_counted() -> None:
    pauses = iter([0.0, 0.05, 0.0, 0.0])
    samples = interleaved({"a": lambda: time.sleep(next(pauses))}, HostClock(), rounds=2, warmup=1)
    assert max(samples["a"]) < 50


def test_the_host_clock_reads_milliseconds() -> None:
    (elapsed,) = interleaved({"a": lambda: time.sleep(0.02)}, HostClock(), rounds=1, warmup=0)["a"]
    assert elapsed >= 20


def test_nothing_to_time() -> None:
    assert interleaved({}, HostClock(), rounds=2) == {}


def test_spread() -> None:
    assert spread([3.0]) == (3.0, 3.0, 3.0)
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == pytest.approx((3.5, 2.0, 5.0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it is a graph")
def test_a_capture_on_a_cpu_makes_every_call() -> None:
    made: list[int] = []
    replay = captured([lambda: made.append(1), lambda: made.append(2)])
    replay()
    assert made == [1, 2]


def test_memory_of_a_cpu_is_not_counted() -> None:
    assert extra_peak_mib(lambda: None, torch.device("cpu")) is None
