"""Parallel texts in two languages: read from a table and split with a fixed seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_kernels.finetune.data.files import DataError, Splits, read_columns


@dataclass(frozen=True)
class Pairs:
    """Sentences and their translations, in the same order."""

    sources: list[str]
    targets: list[str]

    def __len__(self) -> int:
        return len(self.sources)

    def take(self, indices: Sequence[int]) -> Pairs:
        """Select the pairs at ``indices``, in that order."""
        return Pairs([self.sources[i] for i in indices], [self.targets[i] for i in indices])


def read_pairs(path: Path, source_column: str = "source", target_column: str = "target") -> Pairs:
    """Read a UTF-8 CSV, TSV or JSONL file; its suffix selects the format. Raises DataError with the line number."""
    return Pairs(*read_columns(path, {"source": source_column, "target": target_column}))


def split_pairs(pairs: Pairs, seed: int = 0, held_out: float = 0.1) -> Splits[Pairs]:
    """Split into train, validation and test parts so that no source sentence is in two parts.

    held_out: the share of the validation part, and of the test part. Raises DataError if a part would be empty.
    """
    distinct = list(dict.fromkeys(pairs.sources))
    size = int(held_out * len(distinct))
    if not 0 < held_out < 0.5 or not size:
        raise DataError(
            f"a share of {held_out} for validation and for test, of {len(distinct)} different sentences: "
            "the share must be between 0 and 0.5 and leave one in each part"
        )
    random.Random(seed).shuffle(distinct)
    part = {source: min(i // size, 2) for i, source in enumerate(distinct)}
    rows: list[list[int]] = [[], [], []]
    for i, source in enumerate(pairs.sources):
        rows[part[source]].append(i)
    test, validation, train = (pairs.take(indices) for indices in rows)
    random.Random(seed).shuffle(rows[2])
    return Splits(train, validation, test)
