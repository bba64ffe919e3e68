"""Writes adapters into the buffers of pooled layers, in place and all or nothing; a slot has rank 0 meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from lora_kernels.pool.files import Update
from lora_kernels.pool.layer import _Pooled
from lora_kernels.pool.layout import Layout, Move

Put = Callable[[Tensor, Tensor | float], None]


class Change(NamedTuple):
    """The change of one layer: the slots of ``emptied`` are freed, rows are moved, and ``slot`` gets ``update`` at row
    ``start`` (None: the adapter has no weights in this layer). ``layout`` is the layout afterwards."""

    layout: Layout
    emptied: list[int]
    moves: list[Move]
    slot: int
    start: int
    update: Update | None


def plan_change(layout: Layout, slot: int, update: Update | None, gone: Sequence[int], fixed: Sequence[int]) -> Change:
    """Plan the rows of ``slot`` after the slots of ``gone`` are freed. ``holds`` must be true for these arguments."""
    rank, moves = (update.rank if update else 0), list[Move]()
    start = layout.place(slot, rank, gone)
    after = Layout(layout.total, {other: span for other, span in layout.spans.items() if other not in gone})
    if start is None:
        after, moves = layout.packed({*gone, slot}, fixed)
        start = after.place(slot, rank)
        assert start is not None
    after.put(slot, start, rank)
    return Change(after, [other for other in (slot, *gone) if other in layout.spans], moves, slot, start, update)


def write(layers: Sequence[_Pooled], changes: Sequence[Change]) -> None:
    """Carry out the changes, one for each layer. If a step raises, all buffers get their old bits back.

    A slot has rank 0 in all layers while it is written; a kernel that reads it then computes the base alone.
    """
    pairs = list(zip(layers, changes, strict=True))
    with undone_on_failure() as put:
        for layer, change in pairs:
            for slot in (*change.emptied, *(move.slot for move in change.moves)):
                put(layer.pool_ranks[slot], 0)
        for layer, change in pairs:
            for slot, old, new, rank in change.moves:
                for buffer in (layer.pool_A, layer.pool_Bt):
                    put(buffer[new : new + rank], buffer[old : old + rank].clone())  # the two may overlap
                put(layer.pool_starts[slot], new)
            if change.update is not None:
                A, B, scaling, bias = change.update
                rows = slice(change.start, change.start + len(A))
                put(layer.pool_A[rows], A)
                put(layer.pool_Bt[rows], B.t())
                put(layer.pool_starts[change.slot], change.start)
                put(layer.pool_scalings[change.slot], scaling)
                if layer.pool_bias is not None:
                    put(layer.pool_bias[change.slot], 0.0 if bias is None else bias)
        for layer, change in pairs:
            for slot, _, _, rank in change.moves:
                put(layer.pool_ranks[slot], rank)
            if change.update is not None:
                put(layer.pool_ranks[change.slot], change.update.rank)


@contextmanager
def undone_on_failure() -> Iterator[Put]:
    """Yield ``put(place, value)``, which writes. If the block raises, the old bits are restored in reverse order."""
    before: list[tuple[Tensor, Tensor]] = []

    def put(place: Tensor, value: Tensor | float) -> None:
        before.append((place, place.clone()))
        if isinstance(value, Tensor):
            place.copy_(value)
        else:
            place.fill_(value)

    try:
        yield put
    except BaseException:
        for place, bits in reversed(before):
            place.copy_(bits)
        raise
