"""Which rows of a pooled layer belong to which slot: bookkeeping on the host, in plain integers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Span(NamedTuple):
    """``rank`` rows from ``start`` on."""

    start: int
    rank: int


class Move(NamedTuple):
    """The rows of ``slot`` go from ``old`` down to ``new``, in the order given."""

    slot: int
    old: int
    new: int
    rank: int


@dataclass
class Layout:
    """The rows of one layer. ``spans``: of each slot that has some."""

    total: int
    spans: dict[int, Span] = field(default_factory=dict)

    def used(self) -> int:
        """Rows that somebody has."""
        return sum(span.rank for span in self.spans.values())

    def gaps(self, without: Collection[int] = ()) -> Iterator[Span]:
        """The runs of free rows, from the first, once the slots of ``without`` are gone."""
        end = 0
        for start, rank in sorted(span for slot, span in self.spans.items() if slot not in without):
            if start > end:
                yield Span(end, start - end)
            end = start + rank
        if end < self.total:
            yield Span(end, self.total - end)

    def place(self, slot: int, rank: int, without: Collection[int] = ()) -> int | None:
        """Where ``rank`` rows for ``slot`` go: where its rows are, if they are enough, else the first gap that holds
        them. None where no gap does."""
        own = self.spans.get(slot)
        if own is not None and rank <= own.rank:
            return own.start
        return next((gap.start for gap in self.gaps({*without, slot}) if gap.rank >= rank), 0 if rank == 0 else None)

    def put(self, slot: int, start: int, rank: int) -> None:
        """Give ``slot`` these rows in place of those it has."""
        self.spans.pop(slot, None)
        if rank:
            self.spans[slot] = Span(start, rank)

    def packed(self, without: Collection[int] = (), fixed: Collection[int] = ()) -> tuple[Layout, list[Move]]:
        """The rows pushed to the front, once the slots of ``without`` are gone; those of ``fixed`` stay where they are,
        and nobody passes them. And the moves, in an order in which no row is overwritten unread."""
        spans, moves, end = dict[int, Span](), list[Move](), 0
        for slot, (start, rank) in sorted(self.spans.items(), key=lambda item: item[1]):
            if slot in without:
                continue
            if slot in fixed:
                end = start
            elif start != end:
                moves.append(Move(slot, start, end, rank))
            spans[slot] = Span(end, rank)
            end += rank
        return Layout(self.total, spans), moves


def holds(
    layouts: Mapping[str, Layout], slot: int, ranks: Mapping[str, int], without: Collection[int], fixed: Collection[int]
) -> bool:
    """Whether every layer has ``ranks`` rows in one run for ``slot`` once the slots of ``without`` are gone, if need be
    after the rows of the others have moved, but for those of ``fixed``."""
    for path, layout in layouts.items():
        rank = ranks.get(path, 0)
        if layout.place(slot, rank, without) is None:
            packed, _ = layout.packed({*without, slot}, fixed)
            if packed.place(slot, rank) is None:
                return False
    return True


def victims(
    layouts: Mapping[str, Layout],
    slot: int | None,
    ranks: Mapping[str, int],
    candidates: Iterable[int],
    fixed: Collection[int],
) -> tuple[int, list[int]] | None:
    """The slot that an adapter of these ranks gets, and whom it takes it and its rows from.

    ``slot``: the one that it has, or one that is free; None where none is. ``candidates``: slots that may go, first
    those that should. ``fixed``: slots whose rows may not move. Only those go whose going helps. None where all of them
    are not enough.
    """
    gone: list[int] = []
    left = iter(candidates)

    def fits(without: list[int]) -> bool:
        own = slot if slot is not None else min(without, default=None)
        return own is not None and holds(layouts, own, ranks, without, fixed)

    while not fits(gone):
        following = next(left, None)
        if following is None:
            return None
        gone.append(following)
    for spared in reversed(gone[:-1]):
        fewer = [other for other in gone if other != spared]
        if fits(fewer):
            gone = fewer
    return (slot if slot is not None else min(gone)), gone
