"""Sentence classification: a pretrained transformer with a new classification head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from lora_kernels.finetune import values
from lora_kernels.finetune.data.files import Examples, LengthBatches, Splits, read_table, split
from lora_kernels.finetune.data.movies import ARCHIVE, NEUTRAL, movie_reviews
from lora_kernels.finetune.tasks.base import PARTS, Options, Task, check_sizes
from lora_kernels.finetune.tasks.pretrained import MINILM, check_positions, load_pretrained, load_tokenizer
from lora_kernels.finetune.train.extras import require
from lora_kernels.finetune.train.trainer import Metric, Trainer

MOVIES = "movies"
EXAMPLES = ("I love programming", "I hate programming")


@dataclass(frozen=True)
class Classification(Task):
    """Sentence classification.

    model, dtype: the model to fine-tune, see pretrained.py. data: "movies" (movies.py) or a CSV, TSV or JSONL file.
    limit: most sentences to train on, 0 for all. max_length: sentences are cut to this many tokens.
    neutral: movie sentences with a smaller |rating| are left out. held_out, split_seed: see data.files.split.
    """

    name: ClassVar[str] = "classification"
    task_type: ClassVar[str] = "SEQ_CLS"
    monitor: ClassVar[str] = "accuracy"
    libraries: ClassVar[tuple[str, ...]] = ("transformers", "sklearn")

    model: str = MINILM
    dtype: str = "float32"
    data: str = MOVIES
    text_column: str = "text"
    label_column: str = "label"
    neutral: float = NEUTRAL
    limit: int = 0
    max_length: int = 64
    held_out: float = 0.1
    split_seed: int = 0

    def __post_init__(self) -> None:
        check_sizes(self.limit, self.max_length)

    @classmethod
    def add_arguments(cls, parser: Options) -> None:
        add = parser.add_argument
        add("--model", type=values.model, default=cls.model,
            help="packaged model, hub id or folder (default: %(default)s)")  # fmt: skip
        cls.add_data_arguments(parser, MOVIES, f"a .csv, .tsv or .jsonl file, or {ARCHIVE}", "sentences", "a sentence")
        add("--text-column", default=cls.text_column, help="column of --data (default: %(default)s)")
        add("--label-column", default=cls.label_column, help="column of --data (default: %(default)s)")
        add("--neutral", type=values.real(0.0, 4.0), default=cls.neutral,
            help="leave out sentences with a smaller |rating| (default: %(default)s)")  # fmt: skip

    @cached_property
    def splits(self) -> Splits[Examples]:
        """Read and split the data, once."""
        if self.data == MOVIES:
            examples = movie_reviews(neutral=self.neutral)
        elif Path(self.data).name == ARCHIVE:
            examples = movie_reviews(Path(self.data), self.neutral)
        else:
            examples = read_table(Path(self.data), self.text_column, self.label_column)
        return split(examples, self.split_seed, self.held_out).limited(self.limit)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.model)

    @cached_property
    def _padding(self) -> int:
        return self.tokenizer.pad_token_id

    def describe_data(self) -> str:
        return f"{self.data}: {self.splits.sizes()} sentences; classes: {', '.join(self.splits.test.classes)}"

    def load_model(self) -> nn.Module:
        names = self.splits.test.classes
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        model = load_pretrained("AutoModelForSequenceClassification", self.model, self.dtype, **labels)
        config: Any = model.config
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = self._padding  # decoders classify at the last token before padding
        check_positions(model, self.model, self._longest, "give a smaller --max-length")
        return model

    @cached_property
    def _encoded(self) -> dict[str, list[list[int]]]:
        return {part: self.encode(getattr(self.splits, part).texts) for part in PARTS}

    @cached_property
    def _longest(self) -> int:
        return max(len(ids) for rows in (*self._encoded.values(), self.encode(EXAMPLES)) for ids in rows)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize each text; cut its ids at ``max_length``."""
        return self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]

    def collate(self, rows: Sequence[tuple[list[int], int]]) -> dict[str, torch.Tensor]:
        """Pad (token ids, label) pairs: input_ids and attention_mask (rows, longest), labels (rows,)."""
        ids = [torch.tensor(row[0]) for row in rows]
        padded = pad_sequence(ids, batch_first=True, padding_value=self._padding)
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        return {"input_ids": padded, "attention_mask": mask, "labels": torch.tensor([row[1] for row in rows])}

    def loader(self, part: str, batch_size: int) -> DataLoader[Any]:
        examples: Examples = getattr(self.splits, part)
        ids = self._encoded[part]
        rows: Any = list(zip(ids, examples.labels, strict=True))
        batches = LengthBatches([len(row) for row in ids], batch_size, shuffle=part == "train")
        return DataLoader(rows, batch_sampler=batches, collate_fn=self.collate)

    @property
    def criterion(self) -> nn.Module:
        return nn.CrossEntropyLoss()

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return {"accuracy": lambda logits, targets: (logits.argmax(-1) == targets).float().mean()}

    def report(self, trainer: Trainer, loader: Any, untrained: nn.Module) -> dict[str, Any]:
        outputs = [(logits.argmax(-1).cpu(), targets.cpu()) for logits, targets in trainer.predict(loader)]
        predicted, actual = (torch.cat(column) for column in zip(*outputs, strict=True))
        classes = self.splits.test.classes
        matrix = require("sklearn.metrics").confusion_matrix(actual, predicted, labels=range(len(classes)))
        return {
            "accuracy": float((predicted == actual).float().mean()),
            "classes": list(classes),
            "confusion_matrix": matrix.tolist(),
            "predictions": self._predictions(trainer),
        }

    def _predictions(self, trainer: Trainer) -> dict[str, dict[str, float]]:
        rows = [(ids, 0) for ids in self.encode(EXAMPLES)]
        logits, _ = next(trainer.predict([self.collate(rows)]))
        table = logits.float().softmax(-1).tolist()
        classes = self.splits.test.classes
        return {text: dict(zip(classes, row, strict=True)) for text, row in zip(EXAMPLES, table, strict=True)}

    def show(self, trainer: Trainer, report: Mapping[str, Any]) -> list[str]:
        corner, classes = "true | predicted", report["classes"]
        width = max(map(len, [corner, *classes]))
        cells = [name.rjust(9) for name in classes]
        lines = [f"test accuracy {report['accuracy']:.4f}", f"{corner:<{width}} {' '.join(cells)}"]
        for name, row in zip(classes, report["confusion_matrix"], strict=True):
            counts = [str(count).rjust(len(cell)) for count, cell in zip(row, cells, strict=True)]
            lines.append(f"{name:<{width}} {' '.join(counts)}")
        for text, scores in report["predictions"].items():
            best = max(scores, key=scores.__getitem__)
            lines.append(f'"{text}" -> {best} ({scores[best]:.3f})')
        return lines
