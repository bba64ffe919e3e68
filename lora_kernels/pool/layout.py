"""Assigns the rows of a pooled layer to slots, on the host, with plain integers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Span(NamedTuple):
    """The ``rank`` rows that begin at ``start``."""

    start: int
    rank: int


class Move(NamedTuple):
    """Moves the ``rank`` rows of ``slot`` from row ``old`` to the lower row ``new``, in ascending order."""

    slot: int
    old: int
    new: int
    rank: int


@dataclass
class Layout:
    """The ``total`` rows of one layer. ``spans``: {slot: its rows}, for slots with at least one row."""

    total: int
    spans: dict[int, Span] = field(default_factory=dict)

    def used(self) -> int:
        """Return the number of rows that are assigned to slots."""
        return sum(span.rank for span in self.spans.values())

    def gaps(self, without: Collection[int] = ()) -> Iterator[Span]:
        """Yield the runs of free rows in ascending order, with the rows of ``without`` counted as free."""
        end = 0
        for start, rank in sorted(span for slot, span in self.spans.items() if slot not in without):
            if start > end:
                yield Span(end, start - end)
            end = start + rank
        if end < self.total:
            yield Span(end, self.total - end)

    def place(self, slot: int, rank: int, without: Collection[int] = ()) -> int | None:
        """Return the first row of a run of ``rank`` rows for ``slot``: its own rows if they are enough, else the first
        gap that is large enough. None if there is no such gap."""
        own = self.spans.get(slot)
        if own is not None and rank <= own.rank:
            return own.start
        return next((gap.start for gap in self.gaps({*without, slot}) if gap.rank >= rank), 0 if rank == 0 else None)

    def put(self, slot: int, start: int, rank: int) -> None:
        """Assign these rows to ``slot`` and free its old rows."""
        self.spans.pop(slot, None)
        if rank:
            self.spans[slot] = Span(start, rank)

    def packed(self, without: Collection[int] = (), fixed: Collection[int] = ()) -> tuple[Layout, list[Move]]:
        """Return a layout without the slots of ``without`` and with its rows moved to the front, and the moves.

        Rows of ``fixed`` slots stay in place, and no row moves past them. The order of the moves is such that no row is
        overwritten before it is read.
        """
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
    """Return whether every layer has a run of ``ranks[path]`` rows for ``slot`` when the slots of ``without`` are
    freed. Rows of other slots may be moved for this, except those of ``fixed``."""
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
    """Return the slot for an adapter of these ranks, and the slots that must be freed for it.

    ``slot``: its present slot, or a free slot; None if no slot is free. ``candidates``: slots that may be freed, in the
    order of preference. ``fixed``: slots whose rows may not move. A slot is freed only if that makes room. Returns None
    if freeing all candidates does not make enough room.
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
