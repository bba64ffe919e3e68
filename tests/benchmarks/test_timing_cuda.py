"""The GPU's clock, graph and memory counter against a stand-in that notes what is asked of it, so that no typo waits
for the first minute on a GPU."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from benchmarks.timing import CudaClock, extra_peak_mib, interleaved
from lora_kernels.tuning.measure import captured


class _Event:
    def __init__(self, log: list[str]) -> None:
        self._log = log
        self.at = 0

    def record(self) -> None:
        self.at = len(self._log)
        self._log.append("event")

    def elapsed_time(self, end: "_Event") -> float:
        return float(end.at - self.at)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    noted: list[str] = []

    class Properties:
        L2_cache_size = 1024

    class Graph:
        def replay(self) -> None:
            noted.append("replay")

    class Stream:
        def wait_stream(self, other: object) -> None:
            noted.append("wait")

    @contextlib.contextmanager
    def graph(_: Graph) -> Iterator[None]:
        noted.append("capture")
        yield
        noted.append("captured")

    stand_ins = {
        "is_available": lambda: True,
        "get_device_properties": lambda _: Properties,
        "synchronize": lambda: noted.append("sync"),
        "_sleep": lambda cycles: noted.append("sleep" if cycles else "no sleep"),
        "Event": lambda enable_timing: _Event(noted),
        "CUDAGraph": Graph,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda _: contextlib.nullcontext(),
        "graph": graph,
        "reset_peak_memory_stats": lambda: noted.append("reset"),
        "memory_allocated": lambda: 1 << 20,
        "max_memory_allocated": lambda: 5 << 20,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return noted


def test_a_call_lies_between_its_events_and_the_host_runs_ahead(log: list[str]) -> None:
    clock = CudaClock(torch.device("cpu"))
    samples = interleaved({"a": lambda: log.append("a"), "b": lambda: log.append("b")}, clock, rounds=1, warmup=0)
    first = ["sync", "no sleep", "event", "a", "event", "event", "b", "event", "sync"]
    second = ["sync", "sleep", "event", "b", "event", "event", "a", "event", "sync"]
    assert log == first + second
    assert samples == {"a": [2.0], "b": [2.0]}


def test_a_graph_is_warmed_up_on_a_stream_of_its_own_then_captured_once(log: list[str]) -> None:
    replay = captured([lambda: log.append("x"), lambda: log.append("y")], torch.device("cuda"))
    replay()
    replay()
    assert log == ["wait", "x", "y", "wait", "capture", "x", "y", "captured", "replay", "replay"]


def test_the_peak_is_counted_above_what_was_there(log: list[str]) -> None:
    assert extra_peak_mib(lambda: log.append("call"), torch.device("cuda")) == 4.0
    assert log == ["sync", "reset", "call", "sync"]
