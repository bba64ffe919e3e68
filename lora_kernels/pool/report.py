"""Describes the content of a pool in text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lora_kernels.pool.layer import BUFFERS
from lora_kernels.pool.layout import Layout
from lora_kernels.pool.model import PooledModel


class AdapterInfo(NamedTuple):
    """One adapter of a pool. ranks: {path of a layer: rank}. batches: number of running batches that use it. scaling:
    the largest magnitude of its scalings."""

    name: str
    slot: int
    ranks: Mapping[str, int]
    pinned: bool = False
    batches: int = 0
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """The largest of its ranks."""
        return max(self.ranks.values())

    @property
    def state(self) -> str:
        """The reasons why it cannot be evicted; "" if it can."""
        running = f"in {self.batches} batch{'es' if self.batches > 1 else ''}" if self.batches else ""
        return ", ".join(filter(None, ("pinned" if self.pinned else "", running)))


def table(pooled: PooledModel, layouts: Mapping[str, Layout], adapters: Iterable[AdapterInfo]) -> str:
    """Describe the pool in one line, and each adapter in a further line, the least recently used first."""
    held, kind = list(adapters), type(pooled.model).__name__
    if not pooled.layers:
        return f"AdapterPool({kind}, closed)"
    layers = list(pooled.layers.values())
    buffers = [buffer for layer in layers for buffer in map(layer._buffers.get, BUFFERS) if buffer is not None]
    where = sorted({f"{str(layer.pool_A.dtype).removeprefix('torch.')} on {layer.pool_A.device}" for layer in layers})
    used, total = max((layout.used(), layout.total) for layout in layouts.values())
    lines = [
        f"AdapterPool({kind}, {len(layers)} layers, {len(held)} of {pooled.settings.capacity} slots, {used} of "
        f"{total} ranks, up to {pooled.settings.max_rank} each, {', '.join(where)}, "
        f"{sum(buffer.nbytes for buffer in buffers) / 2**20:.1f} MiB)"
    ]
    if held:
        rows = [("slot", "name", "rank", "layers", "state")]
        rows += [(str(one.slot), one.name, str(one.rank), str(len(one.ranks)), one.state) for one in held]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def why_full(
    name: str,
    ranks: Mapping[str, int],
    capacity: int,
    layouts: Mapping[str, Layout],
    adapters: Iterable[AdapterInfo],
) -> str:
    """Return the error message for an adapter of these ranks that does not fit into the pool."""
    held = list(adapters)
    path = max(ranks, key=lambda path: ranks[path] + layouts[path].used())
    return (
        f"no room for {name!r}: {len(held)} of {capacity} slots are taken, and {layouts[path].used()} of "
        f"{layouts[path].total} ranks in {path}, where it needs {ranks[path]}; pinned are "
        f"{[one.name for one in held if one.pinned]}, in use by running batches "
        f"{[one.name for one in held if one.batches]}. Unpin or evict some, wait for a batch to end, or make the pool "
        "larger (capacity, max_rank_total)"
    )
