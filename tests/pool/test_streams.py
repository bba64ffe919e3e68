"""Checks when a load may write, with a replacement of torch.cuda that records its calls."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from lora_kernels.pool.streams import LoadOrder

GPU, OTHER = torch.device("cuda:0"), torch.device("cuda:1")


class Event:
    def __init__(self, said: list[str], name: str) -> None:
        self.said, self.name, self.done = said, name, False

    def query(self) -> bool:
        return self.done


class Stream:
    def __init__(self, said: list[str], name: str) -> None:
        self.said, self.name = said, name

    def record_event(self) -> Event:
        event = Event(self.said, f"event{sum('record' in line for line in self.said)}")
        self.said.append(f"{self.name} record {event.name}")
        return event

    def wait_event(self, event: Event) -> None:
        self.said.append(f"{self.name} wait {event.name}")

    def wait_stream(self, other: Stream) -> None:
        self.said.append(f"{self.name} wait {other.name}")

    def synchronize(self) -> None:
        self.said.append(f"{self.name} synchronize")


class Cuda:
    """The part of torch.cuda that is used."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.capturing = False

    def Stream(self, device: torch.device) -> Stream:
        self.said.append(f"made load{device.index}")
        return Stream(self.said, f"load{device.index}")

    def current_stream(self, device: torch.device) -> Stream:
        return Stream(self.said, f"main{device.index}")

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    @contextmanager
    def stream(self, stream: Stream) -> Any:
        self.said.append(f"in {stream.name}")
        yield
        self.said.append(f"out {stream.name}")

    def since(self) -> list[str]:
        said, self.said[:] = list(self.said), []
        return said


@pytest.fixture
def cuda() -> Cuda:
    return Cuda()


def test_a_load_waits_for_the_batches_of_its_slots_and_for_itself(cuda: Cuda) -> None:
    order = LoadOrder(lambda: [GPU, GPU], cuda)
    order.batch_ended([0, 2])
    order.batch_ended([1])
    assert cuda.since() == ["made load0", "in main0", "main0 record event0", "out main0",
                            "in main0", "main0 record event1", "out main0"]  # fmt: skip
    with order.writing([2, 3]):
        cuda.said.append("write")
    assert cuda.since() == ["in load0", "load0 wait event0", "write", "load0 synchronize", "out load0"]
    with order.writing([2]):
        cuda.said.append("write")
    assert "load0 wait event0" not in cuda.since()  # waited for once


def test_what_failed_was_put_back_before_anybody_goes_on(cuda: Cuda) -> None:
    order = LoadOrder(lambda: [GPU], cuda)
    order.batch_ended([0])
    with pytest.raises(ValueError, match="mine"), order.writing([0]):
        raise ValueError("mine")
    assert cuda.since()[-2:] == ["load0 wait event0", "load0 synchronize"]
    with order.writing([0]):
        cuda.said.append("write")
    assert cuda.since() == ["in load0", "load0 wait event0", "write", "load0 synchronize", "out load0"]


def test_every_gpu_has_its_own_stream_also_after_a_move(cuda: Cuda) -> None:
    devices = [torch.device("cpu")]
    order = LoadOrder(lambda: devices, cuda)
    order.batch_ended([0])
    with order.writing([0]), order.converting([torch.zeros(1)]):
        cuda.said.append("write")
    assert cuda.since() == ["write"]
    devices[:] = [OTHER, GPU, torch.device("cpu")]
    order.batch_ended([0])
    assert [line for line in cuda.since() if "record" in line] == ["main0 record event0", "main1 record event1"]
    with order.writing([0]):
        cuda.said.append("write")
    said = cuda.since()
    for line in ("load0 wait event0", "load0 wait event1", "load1 wait event0", "load1 wait event1"):
        assert said.index(line) < said.index("write")
    assert [line for line in said if "synchronize" in line] == ["load0 synchronize", "load1 synchronize"]


def test_events_that_have_happened_are_dropped(cuda: Cuda) -> None:
    order = LoadOrder(lambda: [GPU], cuda)
    for _ in range(3):
        order.batch_ended([0])
        order._last[0][-1].done = True
    assert len(order._last[0]) == 1


def test_nothing_is_recorded_while_a_graph_is_captured(cuda: Cuda) -> None:
    order = LoadOrder(lambda: [GPU], cuda)
    cuda.capturing = True
    order.batch_ended([0])
    assert not any("record" in line for line in cuda.since())
    with order.writing([0]):
        cuda.said.append("write")
    assert cuda.since() == ["in load0", "write", "load0 synchronize", "out load0"]


def test_converting_comes_after_what_made_the_tensors(cuda: Cuda) -> None:
    order = LoadOrder(lambda: [GPU], cuda)
    with order.converting([torch.zeros(1)]):
        cuda.said.append("convert")
    assert cuda.since() == ["made load0", "in load0", "convert", "load0 synchronize", "out load0"]

    class OnGpu:
        device = GPU

    with order.converting([torch.zeros(1), OnGpu()]):  # type: ignore[list-item]
        cuda.said.append("convert")
    assert cuda.since() == ["load0 wait main0", "in load0", "convert", "load0 synchronize", "out load0"]
