"""An open batch: what it says of a layer's rows, and why it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels.errors import AdapterPoolError, UnknownRowsError
from lora_kernels.pool.active import ActiveBatch
from lora_kernels.pool.batch import OpenBatch
from lora_kernels.pool.call import Call
from lora_kernels.pool.ids import BatchIds
from lora_kernels.pool.rows import BLOCK, RowLayout

K = 5


class Layer:
    pool_path = "its.path"

    def __init__(self, *layouts: RowLayout | None, tokens: bool = False) -> None:
        self.pool_rows = {(tokens, 2 + at): layout for at, layout in enumerate(layouts) if layout is not None}


def rows(*rules: tuple[int, str, int], images: bool = False) -> RowLayout:
    return RowLayout(images, frozenset({(axis, BLOCK) for axis, *_ in rules}), frozenset(rules), {})


def named(*values: int) -> BatchIds:
    return BatchIds(torch.tensor(values, dtype=torch.int32), 9, named=True, values=[*values])


def call(**inputs: tuple[int, ...]) -> Call:
    return Call((), {name: torch.zeros(shape) for name, shape in inputs.items()}, (), False)


def slots(batch: OpenBatch, layer: Any, *lead: int) -> list[int]:
    found = batch.of(torch.empty(*lead, K), layer)
    assert isinstance(found, Tensor)
    return found.tolist()


def test_what_a_call_says_of_its_rows() -> None:
    batch, layer = OpenBatch(ActiveBatch(), named(4, 6)), Layer(rows((0, "x", 1)))
    for length in (3, 2):
        batch.enter(call(x=(2, length)))
        assert slots(batch, layer, 2 * length) == [4] * length + [6] * length
        with pytest.raises(
            UnknownRowsError, match=r"its.path is called with x \(8, 5\), and the batch has 2 adapter ids"
        ):
            batch.of(torch.empty(8, K), layer)
    batch.leave()
    with pytest.raises(UnknownRowsError):  # no call, no length
        batch.of(torch.empty(4, K), layer)


def test_requests_that_generate_repeats() -> None:
    batch, layer = OpenBatch(ActiveBatch(), named(4, 6)), Layer(rows((0, "", 1)))
    assert slots(batch, layer, 2) == [4, 6]
    batch.expand = 3
    assert slots(batch, layer, 6) == [4, 4, 4, 6, 6, 6]
    batch.expand = 1
    with pytest.raises(UnknownRowsError):
        batch.of(torch.empty(6, K), layer)


def test_inputs_that_hold_other_requests() -> None:
    batch, layer = OpenBatch(ActiveBatch(), named(4, 6)), Layer(rows((0, "", 1)))
    batch.enter(call(x=(5, 3)))
    with pytest.raises(UnknownRowsError, match=r"none of the model's inputs \(x \(5, 3\)\) has 2 requests"):
        batch.of(torch.empty(2, K), layer)
    batch.enter(call(x=(2, 3)))
    assert slots(batch, layer, 2) == [4, 6]
    batch.enter(call(x=(1, 2)))
    assert batch.tokens
    assert slots(batch, Layer(rows((0, "", 1)), tokens=True), 2) == [4, 6]


def test_images() -> None:
    images, text = Layer(rows((0, "", 1), images=True)), Layer(rows((0, "", 1)))
    batch = OpenBatch(ActiveBatch(), named(4, 6))
    with pytest.raises(UnknownRowsError, match=r"from the images alone.*pool\.batch\(ids, image_ids=\.\.\.\)"):
        batch.of(torch.empty(2, K), images)
    batch = OpenBatch(ActiveBatch(), named(4, 6), named(1, 2, 3))
    assert slots(batch, images, 3) == [1, 2, 3]
    assert slots(batch, text, 2) == [4, 6]
    with pytest.raises(UnknownRowsError, match="2 adapter ids and 3 image ids"):
        batch.of(torch.empty(2, K), images)
    batch = OpenBatch(ActiveBatch(), named(4, 6), named(1, 1))
    assert slots(batch, images, 7) == [1] * 7
    with pytest.raises(UnknownRowsError):
        batch.of(torch.empty(7, K), Layer())
    batch = OpenBatch(ActiveBatch(), named(4, 4), named(4, 4))
    assert not batch.mixed
    assert slots(batch, Layer(), 7) == [4] * 7


def test_what_is_missing_is_learned_once() -> None:
    active, layer, asked = ActiveBatch(), Layer(), []

    def learn(batch: OpenBatch) -> bool:
        asked.append(batch)
        layer.pool_rows[False, 2] = rows((0, "", 1))
        return len(asked) == 1

    active.learn = learn
    batch = OpenBatch(active, named(4, 6))
    assert slots(batch, layer, 2) == slots(batch, layer, 2) == [4, 6]
    assert asked == [batch]
    with pytest.raises(UnknownRowsError):
        batch.of(torch.empty(3, K), layer)
    assert len(asked) == 2


def test_after_its_end_nothing_is_served() -> None:
    batch = OpenBatch(ActiveBatch(), named(4, 6), touched={"its.path"})
    batch.refuse("it has ended")
    with pytest.raises(AdapterPoolError, match="it has ended"):
        assert "its.path" in batch.touched
    with pytest.raises(AdapterPoolError, match="it has ended"):
        batch.traced(torch.empty(2, K), Layer())
