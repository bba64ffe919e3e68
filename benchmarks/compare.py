"""Two sets of rows side by side: ``python -m benchmarks.compare OLD NEW [--threshold 0.02]``, for a reviewer or a CI.

Rows are matched by what was measured (operator, mode, dtype, shape, dropout, implementation, plan asked for). One is
slower or faster *beyond noise* where the 20th to 80th percentile of the two do not overlap and the medians differ by
more than the threshold. Exit status: 0; 1 where a row of ours is slower beyond noise; 2 where the sets cannot be
compared (another machine, a rehearsal, no row in common).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rows import REHEARSAL, Record, read_rows

OURS = "lora_kernels"
VERSIONS = ("driver", "cuda", "torch", "triton", "commit")
_KEY = (
    "op",
    "mode",
    "dtype",
    "format",
    "M",
    "N",
    "K",
    "r",
    "L",
    "dropout",
    "ranks",
    "distribution",
    "sequence",
    "implementation",
)
Key = tuple[object, ...]


@dataclass(frozen=True)
class Pair:
    """A row of OLD and its counterpart in NEW; times in ms, or in times of the frozen layer of the same run."""

    key: Key
    old: tuple[float, float, float]  # median, 20th and 80th percentile
    new: tuple[float, float, float]

    @property
    def ratio(self) -> float:
        """Above 1: slower now."""
        return self.new[0] / self.old[0]

    @property
    def ours(self) -> bool:
        return str(self.key[_KEY.index("implementation")]).startswith(OURS)

    def verdict(self, threshold: float) -> str:
        """ "slower", "faster", or "same" where the spreads overlap or the medians are within ``threshold``."""
        if self.new[1] > self.old[2] and self.ratio > 1 + threshold:
            return "slower"
        if self.new[2] < self.old[1] and self.ratio < 1 / (1 + threshold):
            return "faster"
        return "same"

    def __str__(self) -> str:
        return name_of(self.key)


def key_of(row: Record) -> Key:
    """What was measured. Of a plan only what was asked for: "auto" stays "auto" whatever it chose."""
    return (*(row[name] for name in _KEY), str(row["plan"]).partition(" ")[0])


def name_of(key: Key) -> str:
    """A key in words."""
    op, mode, dtype, form, M, N, K, r, L, dropout, ranks, distribution, sequence, implementation, plan = key
    tail = ("" if form == "dense" else f" {form}") + ("" if L == 1 else f" L{L}")
    tail += f" {ranks} {distribution} in {sequence}s" if distribution else ""
    return f"{op} {mode} M{M} N{N} K{K} r{r} p{dropout:g} {dtype}{tail}: {implementation}" + (f" {plan}" * bool(plan))


def _frozen(rows: Sequence[Record]) -> dict[Key, float]:
    return {key_of(row)[:-2]: row["ms_p50"] for row in rows if row["implementation"] == "frozen linear"}


def _times(rows: Sequence[Record], unit: str) -> dict[Key, tuple[float, float, float]]:
    """By key; a case that a round measured more than once counts by its first row."""
    frozen = _frozen(rows)
    times: dict[Key, tuple[float, float, float]] = {}
    for row in rows:
        key = key_of(row)
        one = frozen.get(key[:-2]) if unit == "frozen" else 1.0
        if one is not None:
            times.setdefault(key, (row["ms_p50"] / one, row["ms_p20"] / one, row["ms_p80"] / one))
    return times


@dataclass(frozen=True)
class Comparison:
    """The outcome: matched rows, keys that only one side has, and how the versions differ."""

    pairs: tuple[Pair, ...]
    missing: tuple[Key, ...]
    added: tuple[Key, ...]
    versions: tuple[str, ...]
    drift: float | None  # median ratio of the frozen layer: the machine, not the code

    def regressions(self, threshold: float) -> list[Pair]:
        """Rows of ours that are slower beyond noise, worst first."""
        found = [pair for pair in self.pairs if pair.ours and pair.verdict(threshold) == "slower"]
        return sorted(found, key=lambda pair: -pair.ratio)


def compare(old: Sequence[Record], new: Sequence[Record], unit: str = "time", any_machine: bool = False) -> Comparison:
    """Match two sets of rows.

    Args:
        unit: "time", or "frozen": every time in times of the frozen layer of its own run, which takes a machine's
            drift out and adds the frozen layer's own noise.
        any_machine: compare rows of different machines, too.

    Raises:
        ValueError: rows of different machines, of a rehearsal, or none in common.
    """
    machines = {side: sorted({str(row["gpu"]) for row in rows}) for side, rows in (("OLD", old), ("NEW", new))}
    if any(REHEARSAL in names for names in machines.values()):
        raise ValueError("the rows of a rehearsal are made up; there is nothing to compare")
    if machines["OLD"] != machines["NEW"] and not any_machine:
        raise ValueError(
            f"OLD is of {', '.join(machines['OLD']) or 'no machine'}, NEW of {', '.join(machines['NEW']) or 'none'}; "
            "times of different machines say nothing about the code (--any-machine compares them all the same)"
        )
    before, after = _times(old, unit), _times(new, unit)
    pairs = tuple(Pair(key, before[key], after[key]) for key in before if key in after)
    if not pairs:
        raise ValueError("OLD and NEW have no row in common")
    versions = []
    for name in VERSIONS:
        was, now = (", ".join(sorted({str(row[name]) for row in rows})) for rows in (old, new))
        if was != now:
            versions.append(f"{name}: {was or 'unknown'} -> {now or 'unknown'}")
    ones = {key: ms for key, ms in _frozen(new).items() if key in _frozen(old)}
    drift = statistics.median(ms / _frozen(old)[key] for key, ms in ones.items()) if ones else None
    missing = tuple(key for key in before if key not in after)
    added = tuple(key for key in after if key not in before)
    return Comparison(pairs, missing, added, tuple(versions), drift)


def lines(found: Comparison, threshold: float, unit: str, everything: bool = False) -> Iterator[str]:
    """The comparison as text: versions, what changed beyond noise, what only one side has, the count."""
    yield from (f"differs  {version}" for version in found.versions)
    if found.drift is not None and unit == "time":
        yield f"the frozen layer takes {found.drift:.3f} times what it took: the machine's drift, not the code's"
    for pair in sorted(found.pairs, key=lambda pair: -pair.ratio):
        verdict = pair.verdict(threshold)
        if verdict != "same" or everything:
            word = "SLOWER" if verdict == "slower" and pair.ours else verdict
            yield f"{word:7} {pair.ratio:.3f}  {_spread(pair.old)} -> {_spread(pair.new)}  {pair}"
    yield from (f"missing  {name_of(key)}" for key in found.missing)
    yield from (f"new      {name_of(key)}" for key in found.added)
    yield _count(found, threshold)


def markdown(found: Comparison, threshold: float, unit: str) -> Iterator[str]:
    """The same as a table for a pull request, every matched row in it."""
    shown = "ms" if unit == "time" else "x frozen"
    yield f"{_count(found, threshold)}\n"
    if found.versions:
        yield f"Differs: {'; '.join(found.versions)}.\n"
    yield f"| case | old {shown} (p20 to p80) | new {shown} (p20 to p80) | new / old | beyond noise |"
    yield "|---|---|---|---|---|"
    for pair in sorted(found.pairs, key=lambda pair: -pair.ratio):
        verdict = pair.verdict(threshold)
        mark = "" if verdict == "same" else f"**{verdict}**" if pair.ours else verdict
        yield f"| {pair} | {_spread(pair.old)} | {_spread(pair.new)} | {pair.ratio:.3f} | {mark} |"
    for title, keys in (("Missing", found.missing), ("New", found.added)):
        if keys:
            yield f"\n{title}: " + "; ".join(name_of(key) for key in keys)


def _spread(times: tuple[float, float, float]) -> str:
    return f"{times[0]:.4g} ({times[1]:.4g} to {times[2]:.4g})"


def _count(found: Comparison, threshold: float) -> str:
    verdicts = [pair.verdict(threshold) for pair in found.pairs]
    worse = len(found.regressions(threshold))
    return (
        f"{len(found.pairs)} rows matched: {verdicts.count('slower')} slower beyond noise ({worse} of them ours), "
        f"{verdicts.count('faster')} faster; {len(found.missing)} missing, {len(found.added)} new"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("old", type=Path, help="rows.csv, or a folder with one")
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=0.02, help="differences of medians below it do not count")
    parser.add_argument("--unit", choices=["time", "frozen"], default="time", help="frozen: divide by that run's own")
    parser.add_argument("--any-machine", action="store_true", help="compare rows of different machines as well")
    parser.add_argument("--all", action="store_true", help="print unchanged rows, too")
    parser.add_argument("--markdown", action="store_true", help="print a table for a pull request")
    options = parser.parse_args(argv)
    try:
        found = compare(read_rows(options.old), read_rows(options.new), options.unit, options.any_machine)
    except ValueError as error:
        parser.error(str(error))
    threshold, unit = options.threshold, options.unit
    print(
        "\n".join(markdown(found, threshold, unit) if options.markdown else lines(found, threshold, unit, options.all))
    )
    return 1 if found.regressions(threshold) else 0


if __name__ == "__main__":
    sys.exit(main())
