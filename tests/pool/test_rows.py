"""What probes leave of a layer's layout, and what it says of a call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_kernels.pool.rows import BLOCK, TILED, Evidence, Found, first_layout, places_of

FULL = torch.tensor([0b0101, 0b1001, 0b0110])  # the runs in which each of three requests was altered
ALL = {(0, BLOCK), (0, TILED)}


def owners(*requests: int) -> Tensor:
    """The codes of rows that belong to these requests, -1 for none."""
    return torch.tensor([0 if request < 0 else int(FULL[request]) for request in requests])


def evidence(repeats: int, axis: int = 0, orders: tuple[str, ...] = (BLOCK, TILED)) -> Evidence:
    return Evidence(False, {(axis, order): frozenset({repeats}) for order in orders})


@pytest.mark.parametrize(
    ("found", "lead", "wanted"),
    [
        (Found(0, BLOCK, 1), (2,), [5, 7]),
        (Found(0, BLOCK, 1), (2, 3), [5, 5, 5, 7, 7, 7]),
        (Found(1, BLOCK, 1), (3, 2), [5, 7] * 3),
        (Found(0, BLOCK, 3), (6,), [5, 5, 5, 7, 7, 7]),
        (Found(0, TILED, 3), (6,), [5, 7] * 3),
        (Found(1, BLOCK, 2), (2, 4, 1), [5, 5, 7, 7] * 2),
    ],
)
def test_spread(found: Found, lead: tuple[int, ...], wanted: list[int]) -> None:
    assert found.spread(torch.tensor([5, 7]), lead).tolist() == wanted


def test_spread_makes_no_copy_where_rows_are_requests() -> None:
    ids = torch.tensor([5, 7])
    assert Found(0, BLOCK, 1).spread(ids, (2,)) is ids
    assert Found(0, BLOCK, 1).spread(ids, (2, 1, 1)) is ids


def test_places_explain_every_change() -> None:
    assert places_of([((3,), owners(0, 1, 2))], FULL) == dict.fromkeys(ALL, frozenset({1}))
    assert places_of([((6,), owners(0, 0, 1, 1, 2, 2))], FULL) == {(0, BLOCK): frozenset({2})}
    assert places_of([((6,), owners(0, 1, 2, 0, 1, 2))], FULL) == {(0, TILED): frozenset({2})}
    assert places_of([((2, 3), owners(0, 1, 2, 0, 1, 2))], FULL).keys() == {(1, BLOCK), (1, TILED)}
    assert places_of([((3, 3), owners(*[0] * 3, *[1] * 3, *[2] * 3))], FULL).keys() == ALL
    assert places_of([((3, 2), owners(-1, 0, -1, 1, -1, 2))], FULL).keys() == ALL  # class tokens
    for codes in (
        owners(2, 1, 0),
        owners(0, 0, 1),
        owners(0, 1, -1),  # a request that is nowhere seen
        owners(0, 1, 2) | owners(1, 1, 1),  # rows that mix
        owners(0, 1, 2, 2),
        owners(-1, -1, -1),
    ):
        assert places_of([((len(codes),), codes)], FULL) == {}
    both = [((3,), owners(0, 1, 2)), ((6,), owners(0, 0, 1, 1, 2, 2))]
    assert places_of(both, FULL) == {(0, BLOCK): frozenset({1, 2})}
    assert places_of([*both, ((2,), owners(0, 1))], FULL) == {}


def test_a_number_that_two_rules_explain_is_not_known_until_they_differ() -> None:
    layout = first_layout(evidence(4, orders=(BLOCK,)), {"x": 4, "mask": 8}, "first")
    assert layout.find((8,), 2, {"x": 4, "mask": 8}, "first") == Found(0, BLOCK, 4)  # as the probe saw it
    assert layout.find((8,), 2, {"x": 4}, "other names") == Found(0, BLOCK, 4)
    assert layout.find((10,), 2, {"x": 5}, "another length") is None
    assert layout.plain is None
    layout = layout.after(evidence(5, orders=(BLOCK,)), {"x": 5, "mask": 10}, "second")
    assert layout.find((12,), 2, {"x": 6, "mask": 3}, "third") == Found(0, BLOCK, 6)
    assert layout.find((14,), 2, {"x": 6, "mask": 3}, "third") is None  # as many rows as the length says, or none
    assert layout.find((8,), 2, {}, None) is None


def test_what_needs_no_call() -> None:
    layout = first_layout(evidence(1), {"x": 7}, "key")
    assert layout.plain == Found(0, BLOCK, 1)
    assert layout.find((4, 9), 4, {}, None) == Found(0, BLOCK, 1)
    assert layout.find((8, 9), 4, {}, None) is None  # repeated inputs
    assert layout.find((4,), 3, {"x": 7}, "key") is None


def test_probes_only_take_away() -> None:
    layout = first_layout(evidence(1), {"x": 1}, "one")
    assert layout.find((6,), 2, {"x": 3}, "two") is None  # 1 each, or as many as x is long
    layout = layout.after(evidence(3, orders=(BLOCK,)), {"x": 3}, "two")
    assert layout.find((8,), 2, {"x": 4}, "three") == Found(0, BLOCK, 4)
    layout = layout.after(Evidence(False, {}), {"x": 4}, "three")
    assert layout.places == frozenset()
    assert layout.find((8,), 2, {"x": 4}, "three") is None
    assert layout.after(evidence(4), {"x": 4}, "three").places == frozenset()


def test_one_request_shows_no_place() -> None:
    layout = first_layout(Evidence(True, None), {}, "one")
    assert (layout.images, layout.places) == (True, None)
    assert layout.find((4,), 4, {}, "one") is None
    known = layout.after(Evidence(True, evidence(1).places), {}, "two")
    assert known.plain == Found(0, BLOCK, 1)
    assert known.after(Evidence(True, None), {}, "one") is known


def test_equal_layouts_have_equal_content() -> None:
    one, two = (first_layout(evidence(1), {"x": 7}, "key") for _ in "12")
    assert one.content() == two.content()
    assert one.content() != first_layout(evidence(2), {"x": 7}, "key").content()
