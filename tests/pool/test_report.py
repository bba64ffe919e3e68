"""A pool in words; what AdapterPool prints of itself is in test_pool.py."""

from __future__ import annotations

from typing import Any

from lora_kernels.pool.active import ActiveBatch
from lora_kernels.pool.layer import PoolSettings
from lora_kernels.pool.layout import Layout, Span
from lora_kernels.pool.model import PooledModel
from lora_kernels.pool.report import AdapterInfo, table, why_full


def test_state_of_an_adapter() -> None:
    one = AdapterInfo("a", 0, {"x": 2, "y": 5})
    assert (one.rank, one.state) == (5, "")
    assert one._replace(pinned=True).state == "pinned"
    assert one._replace(batches=1).state == "in 1 batch"
    assert one._replace(pinned=True, batches=2).state == "pinned, in 2 batches"


def test_table(served: Any) -> None:
    pooled = PooledModel(served().half(), ["q"], PoolSettings(2, 8, 4), ActiveBatch())
    layouts = {"x": Layout(8, {1: Span(0, 3)}), "y": Layout(8)}
    first, *rest = table(pooled, layouts, [AdapterInfo("longest name", 1, {"x": 3}, True)]).splitlines()
    assert first.startswith("AdapterPool(Served, 2 layers, 1 of 2 slots, 3 of 8 ranks, up to 4 each, float32 on cpu, ")
    assert rest == ["slot  name          rank  layers  state", "1     longest name  3     1       pinned"]
    pooled.restore()
    assert table(pooled, layouts, []) == "AdapterPool(Served, closed)"


def test_why_full_tells_of_the_fullest_layer() -> None:
    layouts = {"x": Layout(8, {0: Span(0, 3)}), "y": Layout(8, {0: Span(0, 6)})}
    adapters = [AdapterInfo("a", 0, {"x": 3, "y": 6}, pinned=True), AdapterInfo("b", 1, {"x": 0}, batches=2)]
    said = why_full("new", {"x": 4, "y": 4}, 2, layouts, adapters)
    assert "no room for 'new': 2 of 2 slots are taken, and 6 of 8 ranks in y, where it needs 4" in said
    assert "pinned are ['a'], in use by running batches ['b']" in said
