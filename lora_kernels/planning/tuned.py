"""Tuned tables: what `lora-kernels tune` measured on one GPU, shipped (kernels/tuned/) or in the user's own cache.

A table is a JSON file of entries with named fields. An entry applies to its direction, dtype, N, K, rank bucket and
dropout, and to row counts within a factor of four of the measured one. Its plan is used only if it was faster than
eager by MARGIN in the same run. Files that are broken, from another version, of another GPU or from a rehearsal are not
used; one warning reports them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import typing
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kernels.errors import ConfigError
from lora_kernels.planning.cost import CallShape, Tiles

FORMAT = 1
MARGIN = 0.98  # of eager's time: a smaller gain may be noise, so eager is kept
REACH = 1  # distance in row buckets (powers of two) at which an entry still applies
SHIPPED = Path(__file__).parents[1] / "kernels" / "tuned"
CONFIGS = {config.__name__: config for config in typing.get_args(Tiles)}


class TableError(ConfigError):
    """A tuned table that cannot be used."""


@dataclass(frozen=True)
class Measured:
    """One candidate: plan, tiles of its main product (None: the default ones), microseconds of a call.

    ``us``: GPU time of a call that finds the L2 cache cold. ``host_us``: time the host takes to queue it.
    """

    plan: str
    tiles: Tiles | None
    us: float
    host_us: float = 0.0

    @property
    def cost(self) -> float:
        """Microseconds a call in a stream of such calls: the slower of GPU and host."""
        return max(self.us, self.host_us)


@dataclass(frozen=True)
class Entry:
    """One tuned problem: what was measured, where and with what. ``measured`` holds every candidate that passed the
    error rule, eager among them; ``chosen`` is one of those. Sizes as in CallShape; ``r`` represents its bucket."""

    gpu: str
    op: str
    dtype: str
    M: int
    N: int
    K: int
    r: int
    dropout: bool
    bits: bool
    bias: bool
    need_dx: bool
    measured: tuple[Measured, ...]
    torch: str
    triton: str
    driver: str
    commit: str
    date: str

    @property
    def eager(self) -> Measured:
        return next(m for m in self.measured if m.plan == "eager")

    @property
    def chosen(self) -> Measured:
        """The fastest candidate, or eager if none is faster by the margin."""
        best = min(self.measured, key=lambda m: m.cost)
        return best if best.cost <= MARGIN * self.eager.cost else self.eager

    def best(self, plan: str) -> Measured | None:
        """The fastest tiles of one plan; None if it was not measured."""
        return min((m for m in self.measured if m.plan == plan), key=lambda m: m.cost, default=None)


def bucket(size: int) -> int:
    """ceil(log2(size)): sizes of one bucket are within a factor of two."""
    return max(size - 1, 0).bit_length()


Key = tuple[str, str, int, int, int, bool, bool, bool]


def key_of(q: CallShape | Entry) -> Key:
    """The fields in which a call and an entry must agree: all but the row count."""
    dtype = q.dtype if isinstance(q.dtype, str) else str(q.dtype).removeprefix("torch.")
    return q.op, dtype, q.N, q.K, max(bucket(q.r), 4), q.dropout, q.dropout and q.bits, q.op == "bwd" and q.need_dx


class Table:
    """The entries of one GPU, by key and row bucket; a later entry replaces an earlier one with the same key."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._entries: dict[Key, dict[int, Entry]] = {}
        for entry in entries:
            self._entries.setdefault(key_of(entry), {})[bucket(entry.M)] = entry

    @property
    def entries(self) -> list[Entry]:
        return [entry for rows in self._entries.values() for entry in rows.values()]

    def lookup(self, q: CallShape) -> Entry | None:
        """The entry with the nearest row bucket, the larger of two equally near; None if none is within REACH."""
        rows = self._entries.get(key_of(q), {})
        near = [b for b in rows if abs(b - bucket(q.M)) <= REACH]
        return rows[min(near, key=lambda b: (abs(b - bucket(q.M)), -b))] if near else None

    def exact(self, q: CallShape) -> Entry | None:
        """The entry measured in q's own row bucket."""
        return self._entries.get(key_of(q), {}).get(bucket(q.M))


def tiles_to_json(tiles: Tiles | None) -> dict[str, Any] | None:
    """{"kind": the class's name, "fields": {name: value}}."""
    if tiles is None:
        return None
    return {"kind": type(tiles).__name__, "fields": dataclasses.asdict(tiles)}


def _tiles_from_json(found: Any) -> Tiles | None:
    return None if found is None else CONFIGS[found["kind"]](**found["fields"])


def dumps(gpu: str, entries: Iterable[Entry], rehearsal: bool = False) -> str:
    """The table as JSON text, one entry a line."""
    rows = []
    for entry in entries:
        row = {field.name: getattr(entry, field.name) for field in dataclasses.fields(Entry)}
        chosen = entry.chosen
        row["measured"] = [
            {"plan": m.plan, "tiles": tiles_to_json(m.tiles), "us": m.us, "host_us": m.host_us} for m in entry.measured
        ]
        row |= {"plan": chosen.plan, "tiles": tiles_to_json(chosen.tiles), "us": chosen.us}  # for readers
        rows.append(json.dumps(row))
    head = json.dumps({"format": FORMAT, "gpu": gpu, "rehearsal": rehearsal})[:-1]
    return f'{head}, "entries": [\n' + ",\n".join(rows) + "\n]}\n"


def loads(text: str, gpu: str, rehearsal: bool = False) -> list[Entry]:
    """Parse the entries of a table for ``gpu``.

    Raises:
        TableError: not JSON, another format, another GPU, a rehearsal (unless ``rehearsal``), or invalid fields.
    """
    try:
        found = json.loads(text)
        if found["format"] != FORMAT:
            raise TableError(f"its format is {found['format']!r}, this version reads {FORMAT}")
        if found["rehearsal"] is not rehearsal:
            raise TableError("it is a rehearsal's, whose figures mean nothing" if found["rehearsal"] else "it is real")
        if found["gpu"] != gpu:
            raise TableError(f"it was measured on {found['gpu']!r}, this is {gpu!r}")
        return [_entry(row) for row in found["entries"]]
    except TableError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TableError(f"it cannot be read: {type(error).__name__}: {str(error)[:100]}") from None


def _entry(row: Mapping[str, Any]) -> Entry:
    measured = tuple(
        Measured(str(m["plan"]), _tiles_from_json(m["tiles"]), float(m["us"]), float(m["host_us"]))
        for m in row["measured"]
    )
    values = {field.name: row[field.name] for field in dataclasses.fields(Entry)} | {"measured": measured}
    for field in dataclasses.fields(Entry):
        if field.type in ("int", "bool", "str") and type(values[field.name]).__name__ != field.type:
            raise TypeError(f"{field.name} is {values[field.name]!r}, expected {field.type}")
    entry = Entry(**values)
    if not all(m.us > 0 and m.host_us >= 0 for m in measured) or not any(m.plan == "eager" for m in measured):
        raise ValueError("a time is not positive, or eager was not measured")
    return entry


def slug(gpu: str) -> str:
    """A GPU's name as a file name: "NVIDIA_H100_80GB_HBM3"."""
    return re.sub(r"[^A-Za-z0-9]+", "_", gpu).strip("_")


def cache_folder() -> Path:
    """The folder of the user's tables: $LORA_KERNELS_CACHE, else lora_kernels in $XDG_CACHE_HOME or ~/.cache."""
    if given := os.environ.get("LORA_KERNELS_CACHE"):
        return Path(given) / "tuned"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_kernels" / "tuned"


def user_table(gpu: str) -> Path:
    """The file `lora-kernels tune` writes for this GPU by default."""
    return cache_folder() / f"{slug(gpu)}.json"


def read(path: Path, gpu: str) -> list[Entry]:
    """The entries of a file; none if it does not exist. Warns if it cannot be used; the planner then uses its model."""
    try:
        return loads(path.read_text(), gpu)
    except FileNotFoundError:
        return []
    except (TableError, OSError, UnicodeDecodeError) as error:
        warnings.warn(
            f"the tuned table {path} is not used: {error}; `lora-kernels tune` writes a new one", stacklevel=2
        )
        return []


@functools.cache
def table_for(gpu: str) -> Table:
    """The tuned table of a GPU by its name: the shipped one overlaid by the user's; empty with LORA_KERNELS_TUNED=0.

    Read once; forget() makes the next call read again.
    """
    if not gpu or os.environ.get("LORA_KERNELS_TUNED", "1") == "0":
        return Table()
    return Table(entry for path in (SHIPPED / f"{slug(gpu)}.json", user_table(gpu)) for entry in read(path, gpu))
