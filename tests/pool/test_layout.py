"""Checks where rows are placed, which slots are freed, and that no row is overwritten before it is read."""

from __future__ import annotations

import random

from lora_kernels.pool.layout import Layout, Move, Span, holds, victims


def filled(total: int, *spans: tuple[int, int, int]) -> Layout:
    """(slot, start, rank) each."""
    return Layout(total, {slot: Span(start, rank) for slot, start, rank in spans})


def test_gaps_and_what_is_used() -> None:
    layout = filled(12, (0, 2, 3), (1, 8, 2))
    assert list(layout.gaps()) == [Span(0, 2), Span(5, 3), Span(10, 2)]
    assert list(layout.gaps(without=[1])) == [Span(0, 2), Span(5, 7)]
    assert list(filled(4, (0, 0, 4)).gaps()) == []
    assert layout.used() == 5


def test_place() -> None:
    layout = filled(12, (0, 2, 3), (1, 8, 2))
    assert layout.place(2, 2) == 0
    assert layout.place(2, 3) == 5
    assert layout.place(2, 4) is None
    assert layout.place(2, 4, without=[1]) == 5
    assert layout.place(0, 2) == 2  # stays, if it can
    assert layout.place(0, 8) == 0  # its own rows count as free
    assert layout.place(0, 9) is None
    assert filled(4, (0, 0, 4)).place(1, 0) == 0  # a layer that the adapter leaves out


def test_put() -> None:
    layout = filled(12, (0, 2, 3))
    layout.put(0, 5, 1)
    layout.put(1, 0, 4)
    layout.put(2, 0, 0)
    assert layout.spans == {0: (5, 1), 1: (0, 4)}
    layout.put(1, 0, 0)
    assert layout.spans == {0: (5, 1)}


def test_packed_goes_up_to_who_stays() -> None:
    layout = filled(20, (0, 3, 2), (1, 8, 3), (2, 13, 4), (3, 18, 1))
    after, moves = layout.packed()
    assert moves == [Move(0, 3, 0, 2), Move(1, 8, 2, 3), Move(2, 13, 5, 4), Move(3, 18, 9, 1)]
    assert after.spans == {0: (0, 2), 1: (2, 3), 2: (5, 4), 3: (9, 1)}
    after, moves = layout.packed(without=[0], fixed=[1])
    assert after.spans == {1: (8, 3), 2: (11, 4), 3: (15, 1)}
    assert [move.slot for move in moves] == [2, 3]
    assert layout.spans[0] == (3, 2)  # unchanged by the call


def test_packing_overwrites_nothing_unread() -> None:
    rng = random.Random(0)
    for _ in range(300):
        total, layout = rng.randint(1, 40), Layout(0)
        layout.total = total
        for slot in range(rng.randint(1, 6)):
            rank = rng.randint(1, 9)
            start = layout.place(slot, rank)
            if start is not None:
                gap = next(gap for gap in layout.gaps() if gap.start == start)
                layout.put(slot, start + rng.randint(0, gap.rank - rank), rank)
        fixed = [slot for slot in layout.spans if rng.random() < 0.3]
        gone = [slot for slot in layout.spans if rng.random() < 0.2 and slot not in fixed]
        rows = [-1] * total
        for slot, (start, rank) in layout.spans.items():
            rows[start : start + rank] = [100 * slot + row for row in range(rank)]
        after, moves = layout.packed(gone, fixed)
        for _, old, new, rank in moves:
            assert new < old
            rows[new : new + rank] = list(rows[old : old + rank])
        assert set(after.spans) == set(layout.spans) - set(gone)
        for slot, (start, rank) in after.spans.items():
            assert rows[start : start + rank] == [100 * slot + row for row in range(rank)]
            assert slot not in fixed or start == layout.spans[slot].start
            assert start + rank <= total


def test_holds_every_layer_or_not() -> None:
    layouts = {"x": filled(8, (0, 2, 2), (1, 6, 2)), "y": filled(8, (1, 0, 8))}
    assert holds(layouts, 2, {"x": 2}, (), ())
    assert holds(layouts, 2, {"x": 4}, (), ())  # after rows have moved
    assert not holds(layouts, 2, {"x": 4}, (), (0, 1))
    assert not holds(layouts, 2, {"x": 5}, (), ())
    assert not holds(layouts, 2, {"x": 2, "y": 1}, (), ())
    assert holds(layouts, 2, {"x": 2, "y": 1}, (1,), (0,))


def test_victims() -> None:
    layouts = {"x": filled(8, (0, 0, 2), (1, 2, 4), (2, 6, 2))}
    assert victims(layouts, 3, {"x": 0}, [0, 1, 2], ()) == (3, [])
    assert victims(layouts, 3, {"x": 2}, [2, 1, 0], ()) == (3, [2])
    assert victims(layouts, 3, {"x": 4}, [0, 1, 2], ()) == (3, [1])  # 0 need not go
    assert victims(layouts, None, {"x": 0}, [2, 0], ()) == (2, [2])  # no slot is free
    assert victims(layouts, None, {"x": 5}, [0, 1, 2], ()) == (0, [0, 1])
    assert victims(layouts, 3, {"x": 4}, [0, 2], ()) == (3, [0, 2])
    assert victims(layouts, 3, {"x": 4}, [0, 2], (1,)) is None  # 1 may not move between them
    assert victims(layouts, 3, {"x": 9}, [0, 1, 2], ()) is None
    assert victims(layouts, None, {"x": 1}, [], ()) is None
    assert victims(layouts, 1, {"x": 6}, [0, 2], ()) == (1, [0])  # its own rows count
