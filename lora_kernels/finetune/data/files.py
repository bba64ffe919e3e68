"""Read labelled texts from a table, split them with a fixed seed, batch them by length."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import Sampler

from lora_kernels.errors import LoRAKernelsError
from lora_kernels.finetune.train.extras import require


class DataError(LoRAKernelsError, ValueError):
    """The data cannot be read or used for the task. The message names the place and the reason."""


@dataclass(frozen=True)
class Examples:
    """Texts and their labels. A label is an index into ``classes``."""

    texts: list[str]
    labels: list[int]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> Examples:
        """Select the examples at ``indices``, in that order."""
        return Examples([self.texts[i] for i in indices], [self.labels[i] for i in indices], self.classes)


Part = TypeVar("Part")


@dataclass(frozen=True)
class Splits(Generic[Part]):
    """Disjoint parts of the data: for training, for choosing settings, and for the final report."""

    train: Part
    validation: Part
    test: Part

    def limited(self, limit: int) -> Splits[Part]:
        """Keep the first ``limit`` training rows (0: all). The training part must have ``take``."""
        train: Any = self.train
        return replace(self, train=train.take(range(min(limit or len(train), len(train)))))

    def sizes(self) -> str:
        """Return the number of rows of each part, such as "1,000 train, 100 validation, 100 test"."""
        return ", ".join(f"{len(rows):,} {part}" for part, rows in vars(self).items())


def read_table(path: Path, text_column: str = "text", label_column: str = "label") -> Examples:
    """Read a UTF-8 file with a text and a label column; its suffix (.csv, .tsv, .jsonl) selects the format.

    The classes are the distinct labels: in numeric order if all are numbers (NaN is not), else in alphabetical order.
    Raises DataError, with the line number, for a missing file or column, a line that cannot be parsed or does not have
    one cell for each column, an empty text or label, or a single class.
    """
    texts, names = read_columns(path, {"text": text_column, "label": label_column})
    classes = _class_order(set(names))
    if len(classes) < 2:
        raise DataError(f"{path}: {len(texts)} rows of {len(classes)} classes; classification needs two or more")
    index = {name: i for i, name in enumerate(classes)}
    return Examples(texts, [index[name] for name in names], classes)


def read_columns(path: Path, columns: Mapping[str, str]) -> list[list[str]]:
    """Read columns of a CSV, TSV or JSONL file as lists of stripped texts. columns: {meaning: name in the file}."""
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: the ending must be one of {', '.join(readers)}")
    found: list[list[str]] = [[] for _ in columns]
    try:
        for line, row in reader(path):
            for cells, (meaning, column) in zip(found, columns.items(), strict=True):
                if row.get(column) is None:
                    raise DataError(f"{path}, line {line}: no column {column!r}; there are {sorted(map(str, row))}")
                cell = str(row[column]).strip()
                if not cell:
                    raise DataError(f"{path}, line {line}: the {meaning} is empty")
                cells.append(cell)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from error
    return found


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield (line number, row). Each row has one cell for each column, so cells cannot shift between columns."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        # strict: otherwise a missing closing quote would put the rest of the file into one cell
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        line = 1
        try:
            names = next(reader, [])
            twice = sorted(name for name, count in Counter(names).items() if name and count > 1)
            if twice:
                raise DataError(f"{path}, line 1: the column {twice[0]!r} occurs twice; columns need different names")
            line = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(names):
                    raise DataError(
                        f"{path}, line {line}: {len(cells)} cells, and the first line names {len(names)} columns; put "
                        "a cell that holds the separator or a line break in double quotes"
                    )
                if cells:
                    yield line, dict(zip(names, cells, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}, line {line}: {error}; a double quote inside a quoted cell is doubled") from error


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=_distinct)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: a JSON object is expected, not {type(row).__name__}")
            yield number, row


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError("a name occurs twice")
    return row


def _class_order(names: set[str]) -> tuple[str, ...]:
    try:
        numbers = {name: float(name) for name in names}
    except ValueError:
        return tuple(sorted(names))
    if any(math.isnan(number) for number in numbers.values()):  # NaN cannot be ordered
        return tuple(sorted(names))
    return tuple(sorted(names, key=lambda name: (numbers[name], name)))


def split(examples: Examples, seed: int = 0, held_out: float = 0.1) -> Splits[Examples]:
    """Split into train, validation and test parts with the same class proportions.

    held_out: the share of the validation part, and of the test part. Raises DataError if a class has too few examples.
    """
    rare = min(Counter(examples.labels).values())
    if not 0 < held_out < 0.5 or rare * held_out < 1:
        raise DataError(
            f"a share of {held_out} for validation and for test, with {rare} examples in the smallest class: "
            "the share must be between 0 and 0.5 and leave every class an example in each part"
        )
    train_test_split = require("sklearn.model_selection").train_test_split
    labels = examples.labels
    rest, test = train_test_split(range(len(examples)), test_size=held_out, random_state=seed, stratify=labels)
    train, validation = train_test_split(
        rest, test_size=held_out / (1 - held_out), random_state=seed, stratify=[labels[i] for i in rest]
    )
    return Splits(examples.take(train), examples.take(validation), examples.take(test))


class LengthBatches(Sampler[list[int]]):
    """Batches of items of similar length, which keeps padding small.

    shuffle=True: permute the items with torch's global generator (as RandomSampler does), sort them by length within
    chunks of ``chunk`` batches, then permute the batches. shuffle=False: a fixed order by length.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, shuffle: bool, chunk: int = 50) -> None:
        self.lengths, self.batch_size, self.shuffle, self.chunk = list(lengths), batch_size, shuffle, chunk

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        n, size = len(self.lengths), self.batch_size
        if not self.shuffle:
            order = sorted(range(n), key=self.lengths.__getitem__)
            yield from (order[i : i + size] for i in range(0, n, size))
            return
        items = torch.randperm(n).tolist()
        batches = []
        for start in range(0, n, size * self.chunk):
            chunk = sorted(items[start : start + size * self.chunk], key=self.lengths.__getitem__)
            batches += [chunk[i : i + size] for i in range(0, len(chunk), size)]
        for i in torch.randperm(len(batches)).tolist():
            yield batches[i]
