"""The interface of a fine-tuning task: model, batches, loss, metrics and report."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any, ClassVar, Self

import torch
from torch import nn

from lora_kernels.errors import ConfigError
from lora_kernels.finetune import values
from lora_kernels.finetune.tasks.pretrained import DTYPES
from lora_kernels.finetune.train.trainer import Metric, Trainer

Options = argparse.ArgumentParser | argparse._ArgumentGroup  # both have add_argument
PARTS = ("train", "validation", "test")


class Task(ABC):
    """Base class of tasks. A subclass is a frozen dataclass of settings with the methods below.

    A new task is a file in this folder and an entry in TASKS.
    name: value of ``--task``. task_type: PEFT's task type; it is written into the adapter's configuration and decides
    which modules are trained whole. monitors: "loss" and the names of the metrics. monitor: the one that early
    stopping compares by default. libraries: packages that must be installed; checked before training.
    """

    name: ClassVar[str]
    task_type: ClassVar[str]
    monitor: ClassVar[str] = "loss"
    monitors: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    libraries: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abstractmethod
    def add_arguments(cls, parser: Options) -> None:
        """Declare the task's options. Option names equal field names."""

    @classmethod
    def add_data_arguments(cls, parser: Options, builtin: str, files: str, items: str, unit: str) -> None:
        """Declare the options that tasks share, with the defaults of the fields.

        They are --dtype, --data, --limit, --max-length, --held-out and, if the task has the field, --split-seed.
        builtin: name of the data set that needs no file. files: the files that --data accepts.
        items: what --limit counts. unit: what --max-length limits.
        """
        defaults = {field.name: field.default for field in fields(cls)}  # type: ignore[arg-type]

        def add(name: str, help: str, **arguments: Any) -> None:
            default = defaults[name.replace("-", "_")]
            parser.add_argument(f"--{name}", default=default, help=f"{help} (default: %(default)s)", **arguments)

        add("dtype", "of the frozen weights", choices=DTYPES)
        add("data", f"{builtin}, or {files}", type=values.input_file(builtin))
        add("limit", f"{items} to train on; 0 for all", type=values.whole())
        add("max-length", f"most tokens of {unit}", type=values.whole(2))
        add("held-out", "share of the data for validation, and for test", type=values.held_out)
        if "split_seed" in defaults:
            add("split-seed", "seed of the random split", type=values.split_seed)

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> Self:
        """Make the task from parsed arguments."""
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        return cls(**{name: getattr(arguments, name) for name in names if hasattr(arguments, name)})

    def settings(self) -> dict[str, Any]:
        """Return the settings that decide the task's result, as JSON values."""
        return {"task": self.name, **asdict(self)}  # type: ignore[call-overload]

    @abstractmethod
    def load_model(self) -> nn.Module:
        """Load the pretrained model. Draw the weights of new parts from torch's global generator."""

    @abstractmethod
    def loader(self, part: str, batch_size: int) -> Any:
        """Return batches of "train" (shuffled by torch's global generator), "validation" or "test"."""

    @abstractmethod
    def describe_data(self) -> str:
        """Describe the data and its size in one line."""

    @property
    @abstractmethod
    def criterion(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Return ``criterion(logits, targets)``, which computes the mean loss."""

    @property
    @abstractmethod
    def metrics(self) -> Mapping[str, Metric]:
        """Map each metric's name to a function of (logits, targets) that returns its mean over a batch."""

    @abstractmethod
    def report(self, trainer: Trainer, loader: Any, untrained: nn.Module) -> dict[str, Any]:
        """Measure the trainer's model over ``loader``. Return JSON values.

        untrained: a model from load_model on the trainer's device, for figures before training. It must not be changed.
        """

    @abstractmethod
    def show(self, trainer: Trainer, report: Mapping[str, Any]) -> list[str]:
        """Format the report, and the model's output on examples, as lines of text."""


def check_sizes(limit: int, max_length: int) -> None:
    """Raise ConfigError for a negative ``limit`` or a ``max_length`` below 2."""
    if limit < 0 or max_length < 2:
        raise ConfigError(f"limit is {limit} and max_length {max_length}; at least 0 and 2 are needed")
