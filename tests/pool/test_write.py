"""Writing to the buffers: what is planned, in which order it is written, and that a failure leaves every bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_kernels.pool import write as pool_write
from lora_kernels.pool.active import ActiveBatch
from lora_kernels.pool.files import Update
from lora_kernels.pool.layer import PoolSettings, _Pooled, into_pooled
from lora_kernels.pool.layout import Layout, Span
from lora_kernels.pool.write import plan_change, undone_on_failure, write


def update(rank: int, seed: int) -> Update:
    generator = torch.Generator().manual_seed(seed)
    return Update(torch.randn(rank, 3, generator=generator), torch.randn(2, rank, generator=generator), seed + 0.5)


@pytest.fixture
def layer() -> _Pooled:
    return into_pooled(nn.Linear(3, 2), PoolSettings(4, 8, 8), ActiveBatch(), "x")


def held(layer: _Pooled, slot: int) -> tuple[Tensor, Tensor, float]:
    start, rank = int(layer.pool_starts[slot]), int(layer.pool_ranks[slot])
    return layer.pool_A[start : start + rank], layer.pool_Bt[start : start + rank].t(), float(layer.pool_scalings[slot])


def same(layer: _Pooled, slot: int, one: Update) -> bool:
    A, B, scaling = held(layer, slot)
    return torch.equal(A, one.A) and torch.equal(B, one.B) and scaling == one.scaling


def test_adapters_come_move_and_go(layer: _Pooled) -> None:
    layout, ones = Layout(8), [update(3, 0), update(2, 1), update(2, 2), update(4, 3)]
    for slot in range(3):
        change = plan_change(layout, slot, ones[slot], [], [])
        write([layer], [change])
        layout = change.layout
    assert all(same(layer, slot, ones[slot]) for slot in range(3))
    with pytest.raises(AssertionError):
        plan_change(layout, 3, update(5, 3), [0], [])
    change = plan_change(layout, 3, ones[3], [0], [])  # 0 goes, 1 and 2 move down
    assert change.emptied == [0]
    assert [(slot, old, new) for slot, old, new, _ in change.moves] == [(1, 3, 0), (2, 5, 2)]
    assert layout.spans[0] == Span(0, 3)
    write([layer], [change])
    assert all(same(layer, slot, ones[slot]) for slot in (1, 2, 3))
    assert layer.pool_ranks.tolist() == [0, 2, 2, 4]


def test_rows_that_move_over_themselves(layer: _Pooled) -> None:
    write([layer], [plan_change(Layout(8), 0, update(1, 0), [], [])])
    write([layer], [plan_change(Layout(8, {0: Span(0, 1)}), 1, update(5, 1), [], [])])
    write([layer], [plan_change(Layout(8, {0: Span(0, 1), 1: Span(1, 5)}), 2, update(3, 2), [0], [])])
    assert same(layer, 1, update(5, 1))
    assert same(layer, 2, update(3, 2))


def test_a_layer_that_the_adapter_leaves_out(layer: _Pooled) -> None:
    write([layer], [plan_change(Layout(8), 1, update(3, 0), [], [])])
    change = plan_change(Layout(8, {1: Span(0, 3)}), 1, None, [], [])
    write([layer], [change])
    assert layer.pool_ranks.tolist() == [0] * 4
    assert change.layout.spans == {}


def test_a_rank_is_the_first_and_the_last_that_is_written(layer: _Pooled, monkeypatch: pytest.MonkeyPatch) -> None:
    other = into_pooled(nn.Linear(3, 2), PoolSettings(4, 8, 8), ActiveBatch(), "y")
    layout = Layout(8, {0: Span(0, 2), 1: Span(2, 2), 2: Span(5, 2)})
    names = {layer.pool_ranks.data_ptr(): "rank", other.pool_ranks.data_ptr(): "rank"}
    said, undo = [], pool_write.undone_on_failure

    @pool_write.contextmanager
    def telling() -> Any:
        with undo() as put:

            def told(place: Tensor, value: Any) -> None:
                is_rank = place.untyped_storage().data_ptr() in names
                said.append(f"rank {'0' if value == 0 else 'r'}" if is_rank else "other")
                put(place, value)

            yield told

    monkeypatch.setattr(pool_write, "undone_on_failure", telling)
    write([layer, other], [plan_change(layout, 3, update(4, 1), [1], []) for _ in range(2)])
    assert said[:4] == ["rank 0"] * 4  # of slot 1, which goes, and slot 2, which moves, in both layers
    assert said[-4:] == ["rank r"] * 4
    assert set(said[4:-4]) == {"other"}


def test_undone_on_failure_puts_back_in_reverse() -> None:
    place = torch.arange(6.0)

    def interrupted() -> None:
        with undone_on_failure() as put:
            put(place[:4], torch.ones(4))
            put(place[2:], 5.0)
            assert place.tolist() == [1, 1, 5, 5, 5, 5]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert place.tolist() == [0, 1, 2, 3, 4, 5]
    with undone_on_failure() as put:
        put(place[1], 9)
    assert place.tolist() == [0, 9, 2, 3, 4, 5]
