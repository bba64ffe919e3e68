"""Labelled texts: read from a table, split by a fixed seed, batched by length."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch.utils.data import Sampler

from lora_kernels.errors import LoRAKernelsError
from lora_kernels.finetune.train.extras import require


class DataError(LoRAKernelsError, ValueError):
    """Data that cannot be read, or not be used for the task; the message says where and why."""


@dataclass(frozen=True)
class Examples:
    """Texts and their labels, indices into ``classes``."""

    texts: list[str]
    labels: list[int]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> Examples:
        """The examples at ``indices``, in that order."""
        return Examples([self.texts[i] for i in indices], [self.labels[i] for i in indices], self.classes)


Part = TypeVar("Part")


@dataclass(frozen=True)
class Splits(Generic[Part]):
    """The three disjoint parts: to train on, to choose by, to report."""

    train: Part
    validation: Part
    test: Part


def read_table(path: Path, text_column: str = "text", label_column: str = "label") -> Examples:
    """Reads a CSV, TSV or JSONL file (by its ending; UTF-8) with a text and a label column.

    The classes are the distinct labels, in numeric order if all are numbers (NaN is none), else in alphabetical order.
    DataError, with the line, for a missing file or column, a line that cannot be parsed or has more or fewer cells than
    there are columns, an empty text or label, a single class.
    """
    texts, names = read_columns(path, {"text": text_column, "label": label_column})
    classes = _class_order(set(names))
    if len(classes) < 2:
        raise DataError(f"{path}: {len(texts)} rows of {len(classes)} classes; classification needs two or more")
    index = {name: i for i, name in enumerate(classes)}
    return Examples(texts, [index[name] for name in names], classes)


def read_columns(path: Path, columns: Mapping[str, str]) -> list[list[str]]:
    """Columns of a CSV, TSV or JSONL file, each a list of stripped texts. ``columns``: {what it is: its name there}."""
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: the ending must be one of {', '.join(readers)}")
    found: list[list[str]] = [[] for _ in columns]
    try:
        for line, row in reader(path):
            for cells, (what, column) in zip(found, columns.items(), strict=True):
                if row.get(column) is None:
                    raise DataError(f"{path}, line {line}: no column {column!r}; there are {sorted(map(str, row))}")
                cell = str(row[column]).strip()
                if not cell:
                    raise DataError(f"{path}, line {line}: the {what} is empty")
                cells.append(cell)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from error
    return found


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """(line, row) of each row; every row has a cell for each column, so no cell is read as that of another column."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        # strict: otherwise a quote that is never closed would put the rest of the file into one cell
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
    if any(math.isnan(number) for number in numbers.values()):  # NaN is neither smaller nor larger: no order at all
        return tuple(sorted(names))
    return tuple(sorted(names, key=lambda name: (numbers[name], name)))


def split(examples: Examples, seed: int = 0, held_out: float = 0.1) -> Splits[Examples]:
    """Train, validation and test parts, each class in the same proportion in all; ``held_out`` is the share of the
    validation part and of the test part. DataError when a class has too few examples for that."""
    rare = min(Counter(examples.labels).values())
    if not 0 < held_out < 0.5 or rare * held_out < 1:
        raise DataError(
            f"a share of {held_out} for validation and for test, with {rare} examples in the smallest class: "
            "the share must lie between 0 and 0.5 and leave every class an example in each part"
        )
    train_test_split = require("sklearn.model_selection").train_test_split
    labels = examples.labels
    rest, test = train_test_split(range(len(examples)), test_size=held_out, random_state=seed, stratify=labels)
    train, validation = train_test_split(
        rest, test_size=held_out / (1 - held_out), random_state=seed, stratify=[labels[i] for i in rest]
    )
    return Splits(examples.take(train), examples.take(validation), examples.take(test))


class LengthBatches(Sampler[list[int]]):
    """Batches of items of similar length, so that little is padding.

    Shuffled, an epoch's order is drawn from torch's generator as RandomSampler does it: items are permuted, sorted by
    length within chunks of ``chunk`` batches, and the batches permuted. Not shuffled: by length, always the same.
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
