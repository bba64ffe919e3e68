"""Train a task, test it, save the adapter and check the saved files. Used by `lora-kernels demo` and `train`."""

from __future__ import annotations

import itertools
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_kernels.adapters import load_adapter, merge_lora, save_adapter
from lora_kernels.atomic_write import atomic_write
from lora_kernels.config import LoRAConfig
from lora_kernels.errors import ConfigError
from lora_kernels.finetune.tasks.base import Task
from lora_kernels.finetune.train import processes
from lora_kernels.finetune.train.batch import split_batch, to_device
from lora_kernels.finetune.train.compare import interleaved, peft_model
from lora_kernels.finetune.train.extras import require
from lora_kernels.finetune.train.lora import LoRA
from lora_kernels.finetune.train.loraplus import loraplus_groups
from lora_kernels.finetune.train.memory import saved_for_backward, state_bytes
from lora_kernels.finetune.train.options import TrainOptions
from lora_kernels.finetune.train.plot import plot_history
from lora_kernels.finetune.train.rng import seed_all
from lora_kernels.finetune.train.trainer import Trainer
from lora_kernels.finetune.values import MAX_FLOAT
from lora_kernels.planning.choose import use_backend

Say = Callable[[str], None]
MIB = 1 << 20
_SHOWN = ("epochs", "steps", "stopped_early", "tokens", "seconds")  # of the history, in metrics.json
_CHECKED = 8  # batches on which the reloaded and the merged model are compared


@dataclass(frozen=True)
class Recipe:
    """Settings of a training. With the task's own settings they decide the result. batch_size: per process."""

    lora: LoRAConfig
    options: TrainOptions
    epochs: int = 1
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.01
    loraplus: float | None = None
    seed: int = 0
    device: str = "cpu"
    backend: str = "auto"
    beside_peft: bool = False

    def __post_init__(self) -> None:
        ratio = 1.0 if self.loraplus is None else self.loraplus
        if self.batch_size < 1 or not self.lr > 0 or not self.weight_decay >= 0 or not ratio >= 0:
            raise ConfigError(
                f"batch_size is {self.batch_size}, lr {self.lr}, weight_decay {self.weight_decay}, loraplus "
                f"{self.loraplus}; they must be at least 1, above 0, at least 0 and at least 0"
            )
        if not max(self.lr * ratio, self.lr * self.weight_decay, self.lr * ratio * self.weight_decay) < MAX_FLOAT:
            raise ConfigError(
                f"lr is {self.lr}, weight_decay {self.weight_decay}, loraplus {self.loraplus}: their products must "
                f"stay below {MAX_FLOAT:g}; lower them"
            )

    def settings(self) -> dict[str, Any]:
        """Return the values, beside the options, that must be equal when a checkpoint is resumed."""
        names = ("batch_size", "lr", "weight_decay", "loraplus", "seed", "device", "backend")
        return {"lora": self.lora.to_peft_dict(), **{name: getattr(self, name) for name in names}}

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Make AdamW for the trainable parameters of ``model``."""
        if self.loraplus is not None:
            groups = loraplus_groups(model, self.lr, self.loraplus, weight_decay=self.weight_decay)
            return torch.optim.AdamW(groups, lr=self.lr)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=self.lr, weight_decay=self.weight_decay)


def run(task: Task, recipe: Recipe, out: Path, say: Say = print, resume: bool = False) -> dict[str, Any]:
    """Train, test and save. Return the figures, which are also written to ``out/metrics.json``.

    Writes out/adapter, out/metrics.json, out/training.png, and out/checkpoints if the options enable them.
    In a process group all processes train. Then the first one tests, saves and prints; the others return {}.
    """
    with use_backend(recipe.backend):
        return _run(task, recipe, out, say, resume)


def _run(task: Task, recipe: Recipe, out: Path, say: Say, resume: bool) -> dict[str, Any]:
    started = time.perf_counter()
    for library in (*task.libraries, "matplotlib", *(("peft",) if recipe.beside_peft else ())):
        require(library)  # fail before the training, not after it
    say = (lambda line: None) if processes.rank() > 0 else say
    out.mkdir(parents=True, exist_ok=True)
    say(task.describe_data())
    seed_all(recipe.seed)
    model = LoRA(task.load_model(), recipe.lora).to(recipe.device)
    options = replace(recipe.options, seed=recipe.seed, settings={**task.settings(), **recipe.settings()})
    trainer = Trainer(model, recipe.optimizer(model), task.criterion, recipe.device, options, metrics=task.metrics)
    loaders = {part: task.loader(part, recipe.batch_size) for part in ("train", "validation", "test")}
    together = processes.count() * recipe.batch_size
    shared_loader = loaders["train"] if processes.count() == 1 else task.loader("train", together)
    trainable, total = model.get_num_params(), model.get_num_params(total=True)
    say(f"parameters: {trainable:,} trainable of {total:,} ({100 * trainable / total:.2f} %)")

    history = trainer.train(shared_loader, loaders["validation"], recipe.epochs, resume)
    if processes.rank() > 0:
        return {}
    rate = history.tokens / history.seconds
    say(f"trained {len(history.steps)} steps in {history.seconds:.1f} s, {rate:,.0f} tokens/s")
    fresh = task.load_model().to(recipe.device)  # loaded once: reading a large model is slow
    report = task.report(trainer, loaders["test"], fresh)
    for line in task.show(trainer, report):
        say(line)

    save_adapter(model, out / "adapter")
    memory = _memory(model, fresh, loaders["train"], recipe.device)
    figures: dict[str, Any] = {
        "settings": options.settings,
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "processes": processes.count(),
        },
        "parameters": {"trainable": trainable, "total": total},
        "training": {name: getattr(history, name) for name in _SHOWN},
        "test": report,
        "adapter": _check_adapter(fresh, trainer, loaders["test"], out / "adapter", say),
        "memory": memory,
    }
    _say_memory(memory, say)
    if recipe.beside_peft:
        figures["beside_peft"] = _beside_peft(task, model, loaders["train"], recipe, out / "adapter", say)
    plot_history(history, out / "training.png", task.monitor)
    figures["seconds"] = time.perf_counter() - started
    atomic_write(out / "metrics.json", (json.dumps(figures, indent=2) + "\n").encode())
    return figures


def _check_adapter(fresh: nn.Module, trainer: Trainer, loader: Any, folder: Path, say: Say) -> dict[str, Any]:
    """Compare the trained model with the saved adapter in ``fresh``, before and after merging, on some batches."""
    batches = list(itertools.islice(loader, 0, None, max(1, len(loader) // _CHECKED)))
    again = Trainer(
        load_adapter(fresh, folder),
        trainer.optimizer,
        trainer.criterion,
        trainer.device,
        trainer.options,
        metrics=trainer.metrics,
    )
    reloaded = [_difference(*pair) for pair in _side_by_side(trainer, again, batches)]
    merge_lora(fresh)
    merged = [_difference(*pair) for pair in _side_by_side(trainer, again, batches)]
    figures = {
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "compared": sum(rows for rows, *_ in merged),
        "reloaded_max_difference": max(largest for *_, largest in reloaded),
        "merged_max_difference": max(largest for *_, largest in merged),
        "merged_agreement": sum(equal for _, _, equal, _ in merged) / sum(count for _, count, *_ in merged),
    }
    say(f"adapter on disk: {figures['bytes'] / MIB:.2f} MiB in {folder}")
    say(
        f"reloaded into a fresh model: the logits of {figures['compared']} test rows differ by at most "
        f"{figures['reloaded_max_difference']:.1e}"
    )
    say(
        f"merged into the weights: {100 * figures['merged_agreement']:.2f} % of their predictions agree, "
        f"logits differ by at most {figures['merged_max_difference']:.1e}"
    )
    return figures


def _side_by_side(one: Trainer, other: Trainer, batches: list[Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield both models' logits batch by batch: with a large vocabulary, all of them would fill the memory."""
    for batch in batches:
        yield next(one.predict([batch]))[0], next(other.predict([batch]))[0]


def _difference(a: torch.Tensor, b: torch.Tensor) -> tuple[int, int, int, float]:
    """Count rows, predictions and equal predictions; find the largest difference of two logits."""
    equal = a.argmax(-1) == b.argmax(-1)
    return len(a), equal.numel(), int(equal.sum()), float((a.float() - b.float()).abs().max())


def _memory(model: LoRA, full: nn.Module, loader: Any, device: str) -> dict[str, int]:
    """Compare memory with full fine-tuning: compute gradients and optimizer state, measure activations on one batch."""
    inputs, _ = split_batch(to_device(next(iter(loader)), torch.device(device)))
    return {
        "state_bytes": state_bytes(model),
        "full_state_bytes": state_bytes(full, trainable_only=False),
        "saved_bytes": saved_for_backward(model, inputs),
        "full_saved_bytes": saved_for_backward(full.requires_grad_(True), inputs),
    }


def _say_memory(figures: dict[str, int], say: Say) -> None:
    for name, what in (("state", "gradients and AdamW's state"), ("saved", "saved for the backward of one batch")):
        ours, theirs = figures[f"{name}_bytes"], figures[f"full_{name}_bytes"]
        share = 100 * (ours / theirs - 1)
        say(f"memory, {what}: {ours / MIB:.1f} MiB; in full fine-tuning {theirs / MIB:.1f} MiB ({share:+.0f} %)")


def _beside_peft(task: Task, model: nn.Module, loader: Any, recipe: Recipe, folder: Path, say: Say) -> dict[str, Any]:
    """Measure time and saved bytes of the same steps in PEFT, with the saved adapter."""
    theirs = peft_model(task.load_model(), folder).to(recipe.device)
    batches = list(itertools.islice(iter(loader), 16))
    inputs, _ = split_batch(to_device(batches[0], torch.device(recipe.device)))
    figures: dict[str, Any] = interleaved(model, theirs, batches, task.criterion, recipe.device)
    figures["saved_bytes"] = saved_for_backward(model, inputs)
    figures["peft_saved_bytes"] = saved_for_backward(theirs, inputs)
    say(
        f"forward and backward, this run, this machine: {figures['ours_ms']:.0f} ms a batch, "
        f"PEFT {figures['theirs_ms']:.0f} ms; ratio {figures['ratio']:.3f} "
        f"(p20 {figures['ratio_p20']:.3f}, p80 {figures['ratio_p80']:.3f})"
    )
    say(
        f"saved for the backward of one batch: {figures['saved_bytes'] / MIB:.1f} MiB, "
        f"PEFT {figures['peft_saved_bytes'] / MIB:.1f} MiB"
    )
    return figures
