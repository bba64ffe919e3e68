"""Checks which adapter is least recently used, which may be evicted, and which is in use."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_kernels.errors import AdapterBusyError, AdapterPoolError, PoolFullError, UnknownAdapterError
from lora_kernels.pool.active import ActiveBatch
from lora_kernels.pool.files import Update
from lora_kernels.pool.layer import PoolSettings
from lora_kernels.pool.model import PooledModel
from lora_kernels.pool.state import PoolState


def updates(rank: int) -> dict[str, Update]:
    return {"blocks.0.q": Update(torch.ones(rank, 8), torch.ones(6, rank), 1.0)}


@pytest.fixture
def state(served: Any) -> PoolState:
    state = PoolState(PooledModel(served(), ["q"], PoolSettings(3, 8, 8), ActiveBatch()))
    for name in "abc":
        state.put(name, updates(2), False)
    return state


def test_names_and_slots(state: PoolState) -> None:
    assert [entry.slot for entry in state.entries()] == [0, 1, 2]
    assert state.slots(["b", None, "a", "b"]) == [1, -1, 0, 1]
    assert list(state.held) == ["c", "a", "b"]
    with pytest.raises(UnknownAdapterError, match="no adapter 'x'"):
        state.slots(["c", "x"])
    assert list(state.held) == ["c", "a", "b"]  # c was not used
    with pytest.raises(AdapterPoolError, match="a list of names"):
        state.slots("ab")


def test_batches_count(state: PoolState) -> None:
    state.begin({0, 1})
    state.begin({1})
    assert (state.entry("a").batches, state.entry("b").batches, state.running) == (1, 2, 2)
    with pytest.raises(AdapterBusyError, match="'b' is used by 2 running batches; evict it once"):
        state.idle("b", "evict it")
    state.end({1})
    state.end({0, 1})
    assert (state.entry("b").batches, state.running) == (0, 0)
    assert state.idle("b", "evict it").name == "b"


def test_put_takes_the_least_recently_used_that_may_go(state: PoolState) -> None:
    state.begin({0})
    state.held["b"] = state.entry("b")._replace(pinned=True)
    assert state.put("d", updates(4), False) == 2
    assert list(state.held) == ["a", "b", "d"]
    with pytest.raises(PoolFullError, match=r"3 of 3 slots are taken, and 8 of 8 ranks in blocks.0.q"):
        state.put("e", updates(5), False)
    state.end({0})
    state.remove("b")
    assert state.put("e", updates(2), True) == 1
    assert state.entry("e").pinned
    assert state.layouts["blocks.0.q"].used() == 8
    assert state.layouts["blocks.1.q"].used() == 0
