"""The memory of multi_decode: kept and grown, and counters of captured launches that nobody else gets."""

import threading

import pytest
import torch

from lora_kernels.kernels.multi import workspace as decode_workspace
from lora_kernels.kernels.multi.workspace import _spare_counters, workspace_of
from lora_kernels.testing import poison

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(decode_workspace, "_workspaces", {})
    monkeypatch.setattr(decode_workspace, "_spare", {})


def test_it_is_kept_and_grows_in_every_part():
    first = workspace_of((3, 100, 10, 7), CPU, torch.float16)
    assert workspace_of((3, 90, 10, 1), CPU, torch.float16) is first
    with poison():
        wider = workspace_of((2, 5000, 10, 1), CPU, torch.float16)
    assert wider is not first
    assert [part.numel() >= need for part, need in zip(wider, (3, 5000, 10, 7), strict=True)] == [True] * 4
    assert not wider.counters.any()
    assert [part.dtype for part in wider] == [torch.int32, *[torch.float32] * 3]


def test_dtypes_have_their_own():
    assert workspace_of((3, 9, 9, 9), CPU, torch.float32) is not workspace_of((3, 9, 9, 9), CPU, torch.bfloat16)
    assert workspace_of((3, 0, 0, 0), CPU, torch.float32).counters.numel() >= 3


def test_captured_launches_never_share_counters():
    decode_workspace._spare[CPU] = torch.zeros(64 * 100, dtype=torch.int32)
    taken: list[torch.Tensor] = []

    def take():
        taken.extend(_spare_counters(70, CPU) for _ in range(10))

    threads = [threading.Thread(target=take) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, counters in enumerate(taken):
        counters += number + 1
    assert all((counters == number + 1).all() for number, counters in enumerate(taken))
    assert {counters.data_ptr() % 16 for counters in taken} == {0}


def test_what_is_left_of_the_zeros_may_be_too_little():
    assert not _spare_counters(70, CPU).any()  # none were made
    decode_workspace._spare[CPU] = torch.zeros(64, dtype=torch.int32)
    late = _spare_counters(70, CPU)
    assert (late.numel(), bool(late.any())) == (70, False)
