"""Ids are what the caller's tensor holds now, however it was changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lora_kernels.errors import AdapterPoolError, ShapeError
from lora_kernels.operands.slots import Slots
from lora_kernels.pool.ids import BatchIds, with_factors


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def by_numpy(ids: Tensor) -> None:
    ids.numpy()[0] = 1


def by_data(ids: Tensor) -> None:
    ids.data[0] = 1


def in_place(ids: Tensor) -> None:
    ids[0] = 1


@pytest.mark.parametrize("change", [by_numpy, by_data, in_place])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_every_change_is_seen(change: Callable[[Tensor], None], mode: Callable[[], torch.no_grad]) -> None:
    with mode():
        given = ints(0, 2)
        ids = BatchIds(given, 3)
        kept = ids.now()
        assert kept is not None
        kept["made of them"] = ids.ids
        assert ids.now() == kept
        assert ids.repeated(2).tolist() == [0, 0, 2, 2]
        change(given)
        assert ids.now() == {}
        assert ids.repeated(1).tolist() == [1, 2]
        assert ids.repeated(1, live=True).data_ptr() == given.data_ptr()
        assert not ids.ids.is_inference()


def test_ids_that_name_no_slot() -> None:
    given = ints(0, 2)
    ids = BatchIds(given, 3)
    for value, message in ((3, "from 2 to 3; accepted are -1"), (-2, "from -2 to 2")):
        given.numpy()[0] = value
        for _ in range(2):
            with pytest.raises(ShapeError, match=message):
                ids.now()
    given[0] = -1
    assert ids.now() == {}


def test_another_storage_is_refused() -> None:
    given = ints(0, 2)
    ids = BatchIds(given, 3)
    given.data = ints(1, 1)
    with pytest.raises(AdapterPoolError, match="another storage"):
        ids.now()


def test_ids_that_are_all_one() -> None:
    named = BatchIds(ints(1, 1), 3, named=True, values=[1, 1])
    assert (named.uniform, named.value, named.always) == (ints(1), 1, ints(1))
    assert BatchIds(ints(1, 0), 3, named=True, values=[1, 0]).uniform is None
    given = ints(1, 1)
    ids = BatchIds(given, 3)
    ids.now()
    assert (ids.uniform, ids.value, ids.always) == (ints(1), 1, None)  # they may differ a moment later
    given[0] = 0
    ids.now()
    assert ids.uniform is None
    one = BatchIds(ints(2), 3)
    assert one.always is not None
    assert one.always.data_ptr() == one.live.data_ptr()
    assert BatchIds(ints(), 3).now() == {}


def test_slots_with_a_factor() -> None:
    slots = Slots.of(torch.ones(5, 4), torch.ones(3, 5), [2, 3], [0.5, 2.0])
    more = with_factors(slots, torch.tensor([1, 1, 0]), torch.tensor([0.5, -1.0, 3.0]))
    assert more.starts.tolist() == [0, 2, 2, 2, 0]
    assert more.ranks.tolist() == [2, 3, 3, 3, 2]
    assert more.scalings.tolist() == [0.5, 2.0, 1.0, -2.0, 1.5]
    assert (more.A is slots.A, more.max_rank) == (True, 3)
