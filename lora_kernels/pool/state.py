"""The adapters of a pool, their slots and rows, and the slots that batches use. The caller holds the pool's lock."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from lora_kernels.errors import AdapterBusyError, AdapterPoolError, PoolFullError, UnknownAdapterError
from lora_kernels.pool.files import Update
from lora_kernels.pool.layout import Layout, victims
from lora_kernels.pool.model import PooledModel
from lora_kernels.pool.report import AdapterInfo, why_full
from lora_kernels.pool.streams import LoadOrder
from lora_kernels.pool.write import plan_change, write

TORN = (
    "this process was forked while another thread wrote an adapter into the pool, so the pool is incomplete here; fork "
    "before or after the load, or make the model and the pool in the child process"
)


class PoolState:
    """``held``: the adapters, the least recently used first. ``users``: number of open batches of each slot.
    ``running``: number of all open batches and running loads. ``touched``: paths of the layers in which an adapter has
    weights now; always the same set object. ``changing``: a thread is writing. Another thread can see it set only in
    the child of a fork, where the writing thread does not exist.
    """

    def __init__(self, pooled: PooledModel) -> None:
        self.pooled, self.capacity = pooled, pooled.settings.capacity
        self.held = OrderedDict[str, AdapterInfo]()
        self.users, self.running, self.changing = Counter[int](), 0, False
        self.layouts = {path: Layout(pooled.settings.max_rank_total) for path in pooled.layers}
        self.touched = set[str]()
        self._touched_by = dict[frozenset[int], frozenset[str]]()
        self._order = LoadOrder(lambda: (layer.pool_slots.A.device for layer in pooled.layers.values()))
        self.converting = self._order.converting

    def entry(self, name: object) -> AdapterInfo:
        """Return the adapter of this name. Raises UnknownAdapterError."""
        entry = self._held(name)
        return entry._replace(batches=self.users[entry.slot])

    def _held(self, name: object) -> AdapterInfo:
        entry = self.held.get(name) if isinstance(name, str) else None
        if entry is None:
            raise UnknownAdapterError(f"no adapter {name!r} in the pool; loaded are {sorted(self.held) or 'none'}")
        return entry

    def entries(self) -> Iterator[AdapterInfo]:
        """Iterate over all adapters, the least recently used first."""
        return map(self.entry, self.held)

    def idle(self, name: str, wanted: str) -> AdapterInfo:
        """Return the adapter of this name. Raises AdapterBusyError, with ``wanted`` in its text, if in use."""
        entry = self.entry(name)
        if entry.batches:
            raise AdapterBusyError(
                f"{name!r} is used by {entry.batches} running batch{'es' if entry.batches > 1 else ''}; {wanted} once "
                "they have ended"
            )
        return entry

    def slots(self, names: Sequence[str | None]) -> list[int]:
        """Return the slot of each name, -1 for None, and mark the adapters as just used."""
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise AdapterPoolError(f"{names!r:.80}: expected a list of names, one a sequence, None for no adapter")
        slots = [-1 if name is None else self._held(name).slot for name in names]
        for name in names:
            if name is not None:
                self.held.move_to_end(name)
        return slots

    def touched_by(self, slots: frozenset[int]) -> frozenset[str]:
        """Return the paths of the layers in which one of these slots has weights."""
        if slots not in self._touched_by:
            spans = self.layouts.items()
            self._touched_by[slots] = frozenset(path for path, layout in spans if slots & layout.spans.keys())
        return self._touched_by[slots]

    def begin(self, slots: Iterable[int]) -> None:
        """Count a batch that starts and uses these slots."""
        self.users.update(slots)
        self.running += 1

    def end(self, slots: Iterable[int]) -> None:
        """Count the end of a batch that used these slots."""
        try:
            self._order.batch_ended(slots)
        finally:
            self.users.subtract(slots)
            self.running -= 1

    def put(self, name: str, updates: Mapping[str, Update], pinned: bool) -> int:
        """Write the adapter into a slot and rows, evict the adapters that it replaces, and return the slot."""
        slot, gone = self._room(name, updates)
        ranks = {path: update.rank for path, update in updates.items()}
        scaling = max(abs(update.scaling) for update in updates.values())
        with self._incomplete():
            self._change(slot, updates, gone)
            for other in [entry.name for entry in self.held.values() if entry.slot in (*gone, slot)]:
                del self.held[other]
            self.held[name] = AdapterInfo(name, slot, ranks, pinned, scaling=scaling)
        return slot

    def remove(self, name: str) -> None:
        """Remove the adapter."""
        with self._incomplete():
            self._change(self.held[name].slot, {}, [])
            del self.held[name]

    def _room(self, name: str, updates: Mapping[str, Update]) -> tuple[int, list[int]]:
        """Return the slot for ``name`` and the slots to free for it. Raises PoolFullError."""
        own = self.held.get(name)
        taken = {entry.slot for entry in self.held.values()}
        slot = own.slot if own else min(set(range(self.capacity)) - taken, default=None)
        may_go = [one.slot for one in self.entries() if one.name != name and not one.pinned and not one.batches]
        ranks = {path: update.rank for path, update in updates.items()}
        found = victims(self.layouts, slot, ranks, may_go, self._fixed())
        if found is None:
            raise PoolFullError(why_full(name, ranks, self.capacity, self.layouts, self.entries()))
        return found

    @contextmanager
    def _incomplete(self) -> Iterator[None]:
        """Set ``changing`` while the block runs."""
        self.changing = True
        try:
            yield
        finally:
            self.changing = False

    def _fixed(self) -> list[int]:
        """Return the slots that running batches read."""
        return [slot for slot, batches in self.users.items() if batches]

    def _change(self, slot: int, updates: Mapping[str, Update], gone: Sequence[int]) -> None:
        """Write the updates to ``slot`` in place of the adapters of ``gone`` and of its own, all or nothing."""
        fixed = self._fixed()
        changes = {p: plan_change(layout, slot, updates.get(p), gone, fixed) for p, layout in self.layouts.items()}
        moved = {move.slot for change in changes.values() for move in change.moves}
        self._touched_by.clear()
        self.touched.update(updates)  # before a kernel may read them
        with self._order.writing({slot, *gone, *moved}):
            write([self.pooled.layers[path] for path in changes], list(changes.values()))
        self.layouts = {path: change.layout for path, change in changes.items()}
        self.touched.intersection_update(path for path, layout in self.layouts.items() if layout.spans)
