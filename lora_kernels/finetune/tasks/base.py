"""What a task is: a model, batches, something to minimise, something to measure, something to show."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any, ClassVar, Self

import torch
from torch import nn

from lora_kernels.finetune.train.trainer import Metric, Trainer

Options = argparse.ArgumentParser | argparse._ArgumentGroup  # both have add_argument
PARTS = ("train", "validation", "test")


class Task(ABC):
    """A frozen dataclass of settings with the methods below: all that the Trainer and the command line ask for.

    A new task is a file beside this one and an entry in TASKS; nothing else knows which tasks there are.
    name: as in ``--task NAME``. task_type: PEFT's word for it, written into the adapter's configuration, which also
    decides which modules are trained whole. monitors: "loss" and the names of the metrics. monitor: the one of them
    that early stopping watches by default. libraries: packages that must also be installed; this is checked
    before training.
    """

    name: ClassVar[str]
    task_type: ClassVar[str]
    monitor: ClassVar[str] = "loss"
    monitors: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    libraries: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abstractmethod
    def add_arguments(cls, parser: Options) -> None:
        """Declares the task's own options; their names are those of its fields."""

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> Self:
        """The task with the settings of a command line."""
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        return cls(**{name: getattr(arguments, name) for name in names if hasattr(arguments, name)})

    def settings(self) -> dict[str, Any]:
        """What decides the task's outcome, as JSON values."""
        return {"task": self.name, **asdict(self)}  # type: ignore[call-overload]

    @abstractmethod
    def load_model(self) -> nn.Module:
        """A fresh model with its pretrained weights; parts that are new are drawn from torch's generator."""

    @abstractmethod
    def loader(self, part: str, batch_size: int) -> Any:
        """Batches of "train" (shuffled by torch's generator), "validation" or "test"."""

    @abstractmethod
    def describe_data(self) -> str:
        """One line: how much data there is."""

    @property
    @abstractmethod
    def criterion(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """``criterion(logits, targets)``, the mean loss."""

    @property
    @abstractmethod
    def metrics(self) -> Mapping[str, Metric]:
        """Name -> mean over a batch, from (logits, targets)."""

    @abstractmethod
    def report(self, trainer: Trainer, loader: Any, untrained: nn.Module) -> dict[str, Any]:
        """Final figures of the trainer's model over ``loader``, as JSON values.

        untrained: what load_model gives, on the trainer's device, for figures from before; to be left as it is.
        """

    @abstractmethod
    def show(self, trainer: Trainer, report: Mapping[str, Any]) -> list[str]:
        """Lines for people: the report, and the model at work on examples."""
