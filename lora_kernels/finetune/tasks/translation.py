"""Sentence translation with an encoder-decoder, measured in BLEU."""

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

from lora_kernels.errors import ConfigError
from lora_kernels.finetune.data.files import LengthBatches, Splits
from lora_kernels.finetune.data.pairs import Pairs, read_pairs, split_pairs
from lora_kernels.finetune.data.phrases import phrases
from lora_kernels.finetune.tasks.base import Options, Task, check_sizes
from lora_kernels.finetune.tasks.pretrained import check_positions, load_config, load_pretrained, load_tokenizer
from lora_kernels.finetune.tasks.tokens import IGNORED, TokenLoss, token_accuracy
from lora_kernels.finetune.train.extras import require
from lora_kernels.finetune.train.trainer import Metric, Trainer

PHRASES, PHRASES_COUNT = "phrases", 4000
_SHOWN = 3


def bleu(translations: Sequence[str], references: Sequence[str]) -> float:
    """Compute corpus BLEU (0 to 100, one reference each) with sacrebleu's defaults: 13a tokens, case-sensitive."""
    return float(require("sacrebleu").corpus_bleu(list(translations), [list(references)]).score)


@dataclass(frozen=True)
class Translation(Task):
    """Sentence translation by greedy decoding.

    model, dtype: an encoder-decoder with its tokenizer, see pretrained.py. data: a CSV, TSV or JSONL file with a source
    and a target column, or "phrases", synthetic English and German (phrases.py).
    prefix: put before each source ("translate English to German: " for T5). limit: most pairs to train on, 0 for all.
    max_length: most tokens of a sentence (longer ones are cut) and of a translation. held_out, split_seed: see
    pairs.split_pairs.
    """

    name: ClassVar[str] = "translation"
    task_type: ClassVar[str] = "SEQ_2_SEQ_LM"
    libraries: ClassVar[tuple[str, ...]] = ("transformers", "sacrebleu")

    model: str = ""
    dtype: str = "float32"
    data: str = PHRASES
    source_column: str = "source"
    target_column: str = "target"
    prefix: str = ""
    limit: int = 0
    max_length: int = 64
    held_out: float = 0.1
    split_seed: int = 0

    def __post_init__(self) -> None:
        check_sizes(self.limit, self.max_length)

    @classmethod
    def add_arguments(cls, parser: Options) -> None:
        add = parser.add_argument
        add("--model", default=cls.model, help="folder or hub id of an encoder-decoder (required)")
        cls.add_data_arguments(parser, PHRASES, "a .csv, .tsv or .jsonl file", "pairs", "a sentence")
        add("--source-column", default=cls.source_column, help="column of --data (default: %(default)s)")
        add("--target-column", default=cls.target_column, help="column of --data (default: %(default)s)")
        add("--prefix", default=cls.prefix, help="text put before each source sentence (default: nothing)")

    @cached_property
    def splits(self) -> Splits[Pairs]:
        """Read and split the data, once."""
        if self.data == PHRASES:
            pairs = phrases(PHRASES_COUNT)
        else:
            pairs = read_pairs(Path(self.data), self.source_column, self.target_column)
        return split_pairs(pairs, self.split_seed, self.held_out).limited(self.limit)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self._model_name())

    @cached_property
    def _start(self) -> int:
        start = getattr(load_config(self._model_name()), "decoder_start_token_id", None)
        if start is None:
            raise ConfigError(f"model {self.model!r} has no decoder_start_token_id: is it an encoder-decoder?")
        return start

    def _model_name(self) -> str:
        if not self.model:
            raise ConfigError("translation has no packaged model: give an encoder-decoder with --model")
        return self.model

    def describe_data(self) -> str:
        return f"{self.data}: {self.splits.sizes()} sentence pairs"

    def load_model(self) -> nn.Module:
        model = load_pretrained("AutoModelForSeq2SeqLM", self._model_name(), self.dtype)
        check_positions(model, self.model, self.max_length, "give a smaller --max-length")
        return model

    def encode(self, pairs: Pairs) -> list[tuple[list[int], list[int]]]:
        """Tokenize each pair as (source ids, target ids); cut both at ``max_length``."""
        sources = [self.prefix + source for source in pairs.sources]
        ids = self.tokenizer(sources, text_target=pairs.targets, truncation=True, max_length=self.max_length)
        return list(zip(ids["input_ids"], ids["labels"], strict=True))

    def collate(self, rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        """Pad pairs of (source ids, target ids).

        input_ids, attention_mask: (rows, longest source). labels: (rows, longest target). decoder_input_ids: the labels
        shifted right by one token.
        """
        padding = self.tokenizer.pad_token_id
        sources, targets = ([torch.tensor(ids) for ids in column] for column in zip(*rows, strict=True))
        shifted = [torch.cat([torch.tensor([self._start]), ids[:-1]]) for ids in targets]
        return {
            "input_ids": pad_sequence(sources, batch_first=True, padding_value=padding),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in sources], batch_first=True),
            "decoder_input_ids": pad_sequence(shifted, batch_first=True, padding_value=padding),
            "labels": pad_sequence(targets, batch_first=True, padding_value=IGNORED),
        }

    def loader(self, part: str, batch_size: int) -> DataLoader[Any]:
        rows: Any = self.encode(getattr(self.splits, part))
        lengths = [len(source) + len(target) for source, target in rows]
        batches = LengthBatches(lengths, batch_size, shuffle=part == "train")
        return DataLoader(rows, batch_sampler=batches, collate_fn=self.collate)

    @property
    def criterion(self) -> TokenLoss:
        return TokenLoss()

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return {"accuracy": token_accuracy}

    @torch.no_grad()
    def translate(self, model: Any, sources: Sequence[str], batch_size: int = 32) -> list[str]:
        """Translate ``sources`` by greedy decoding, in order. The model's training mode is restored afterwards."""
        training, found = model.training, []
        model.eval()
        try:
            for start in range(0, len(sources), batch_size):
                texts = [self.prefix + source for source in sources[start : start + batch_size]]
                inputs = self.tokenizer(
                    texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
                ).to(model.device)
                inputs.pop("token_type_ids", None)
                ids = model.generate(**inputs, max_new_tokens=self.max_length, num_beams=1, do_sample=False)
                found += self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        finally:
            model.train(training)
        return found

    def report(self, trainer: Trainer, loader: Any, untrained: nn.Module) -> dict[str, Any]:
        pairs = self.splits.test
        translations = self.translate(trainer.model, pairs.sources)
        before = self.translate(untrained, pairs.sources)
        rows = zip(pairs.sources, pairs.targets, before, translations, strict=True)
        names = ("source", "reference", "before", "translation")
        return {
            **trainer.evaluate(loader),
            "bleu": bleu(translations, pairs.targets),
            "bleu_before": bleu(before, pairs.targets),
            "examples": [dict(zip(names, row, strict=True)) for row in list(rows)[:_SHOWN]],
        }

    def show(self, trainer: Trainer, report: Mapping[str, Any]) -> list[str]:
        lines = [f"test BLEU {report['bleu']:.2f}, before the training {report['bleu_before']:.2f}"]
        return lines + [
            f"{row['source']!r} -> {row['translation']!r} (reference {row['reference']!r})"
            for row in report["examples"]
        ]
