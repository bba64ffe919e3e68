"""Continued training of a causal language model on a text. Reports perplexity before and after, and a sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import DataLoader

from lora_kernels.errors import ConfigError
from lora_kernels.finetune import values
from lora_kernels.finetune.data.files import DataError, Splits
from lora_kernels.finetune.data.movies import movie_reviews
from lora_kernels.finetune.tasks.base import Options, Task
from lora_kernels.finetune.tasks.pretrained import SMOLLM2, check_positions, load_pretrained, load_tokenizer
from lora_kernels.finetune.tasks.tokens import IGNORED, TokenLoss, perplexity, token_accuracy
from lora_kernels.finetune.train.trainer import Metric, Trainer

MOVIES = "movies"
Blocks = list[list[int]]


@dataclass(frozen=True)
class CausalLM(Task):
    """Continued training on a text.

    model, dtype: the model to fine-tune, see pretrained.py. data: a UTF-8 text file, or "movies" (movies.py).
    The text is cut into blocks of max_length tokens. The last blocks are the test part, the blocks before them
    the validation part; each is the fraction held_out of all. limit: most blocks to train on, 0 for all. prompt: start
    of the sample; the first words of the test part if empty. new_tokens: tokens to generate for the sample, 0 for no
    sample.
    """

    name: ClassVar[str] = "causal-lm"
    task_type: ClassVar[str] = "CAUSAL_LM"
    libraries: ClassVar[tuple[str, ...]] = ("transformers",)

    model: str = SMOLLM2
    dtype: str = "float32"
    data: str = MOVIES
    limit: int = 0
    max_length: int = 128
    held_out: float = 0.1
    prompt: str = ""
    new_tokens: int = 40

    def __post_init__(self) -> None:
        if self.limit < 0 or self.max_length < 2 or self.new_tokens < 0:
            raise ConfigError(
                f"limit is {self.limit}, max_length {self.max_length}, new_tokens {self.new_tokens}; "
                "at least 0, 2 and 0 are needed"
            )

    @classmethod
    def add_arguments(cls, parser: Options) -> None:
        add = parser.add_argument
        add("--model", type=values.model, default=cls.model,
            help="packaged model, hub id, folder or .gguf file (default: %(default)s)")  # fmt: skip
        cls.add_data_arguments(parser, MOVIES, "a text file", "blocks", "a block")
        add("--prompt", default=cls.prompt, help="start of the sample (default: how the test text begins)")
        add("--new-tokens", type=values.whole(), default=cls.new_tokens,
            help="length of the sample in tokens; 0 for none (default: %(default)s)")  # fmt: skip

    @cached_property
    def splits(self) -> Splits[Blocks]:
        """Read the text, cut it into blocks and split them, once."""
        ids = self.tokenizer(self._text(), verbose=False)["input_ids"]  # no warning on its length: it is cut below
        size = self.max_length
        blocks = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
        held = int(self.held_out * len(blocks))
        if not 0 < self.held_out < 0.5 or not held:
            raise DataError(
                f"a share of {self.held_out} for validation and for test, of {len(blocks)} blocks of {size} tokens: "
                "the share must be between 0 and 0.5 and leave a block in each part"
            )
        train = blocks[: -2 * held]
        return Splits(train[: self.limit or len(train)], blocks[-2 * held : -held], blocks[-held:])

    def _text(self) -> str:
        if self.data == MOVIES:
            return "\n".join(movie_reviews(neutral=0.0).texts)
        try:
            return Path(self.data).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.data}: {error}") from error

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.model)

    def describe_data(self) -> str:
        return f"{self.data}: {self.splits.sizes()} blocks of {self.max_length} tokens"

    def load_model(self) -> nn.Module:
        model = load_pretrained("AutoModelForCausalLM", self.model, self.dtype)
        check_positions(model, self.model, self.max_length, "give a smaller --max-length")
        if self.new_tokens:
            prompt = len(self.tokenizer(self._prompt)["input_ids"])
            remedy = f"the prompt of the sample has {prompt}, give fewer --new-tokens, or 0 for no sample"
            check_positions(model, self.model, prompt + self.new_tokens, remedy)
        return model

    def collate(self, rows: Blocks) -> dict[str, torch.Tensor]:
        """Stack blocks: input_ids, attention_mask and labels (rows, length). A label is the next token."""
        ids = torch.tensor(rows)
        labels = torch.full_like(ids, IGNORED)
        labels[:, :-1] = ids[:, 1:]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def loader(self, part: str, batch_size: int) -> DataLoader[Any]:
        blocks: Any = getattr(self.splits, part)
        return DataLoader(blocks, batch_size, shuffle=part == "train", collate_fn=self.collate)

    @property
    def criterion(self) -> TokenLoss:
        return TokenLoss()

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return {"accuracy": token_accuracy}

    def report(self, trainer: Trainer, loader: Any, untrained: nn.Module) -> dict[str, Any]:
        base = Trainer(untrained, trainer.optimizer, trainer.criterion, trainer.device, trainer.options,
                       metrics=trainer.metrics)  # fmt: skip
        before, after = base.evaluate(loader), trainer.evaluate(loader)
        return {
            **after,
            "perplexity": perplexity(after["loss"]),
            "perplexity_before": perplexity(before["loss"]),
            "sample": self._sample(trainer) if self.new_tokens else None,
        }

    @property
    def _prompt(self) -> str:
        return self.prompt or self.tokenizer.decode(self.splits.test[0][:8], clean_up_tokenization_spaces=False)

    @torch.no_grad()
    def _sample(self, trainer: Trainer) -> dict[str, str]:
        """Continue the prompt by greedy decoding."""
        prompt = self._prompt
        inputs = self.tokenizer(prompt, return_tensors="pt").to(trainer.device)
        model: Any = trainer.model
        training = model.training
        model.eval()
        try:
            ids = model.generate(**inputs, max_new_tokens=self.new_tokens, do_sample=False)[0]
        finally:
            model.train(training)
        new = ids[inputs["input_ids"].shape[1] :]
        text = self.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return {"prompt": prompt, "text": text}

    def show(self, trainer: Trainer, report: Mapping[str, Any]) -> list[str]:
        lines = [
            f"test perplexity {report['perplexity']:.2f}, before the training {report['perplexity_before']:.2f}; "
            f"{100 * report['accuracy']:.1f} % of the tokens predicted"
        ]
        sample = report["sample"]
        return [*lines, f"{sample['prompt']!r} -> {sample['text']!r}"] if sample else lines
