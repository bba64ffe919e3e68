"""One training of a sweep: as ``recipe.run`` up to the last validation, with pruning, without files.

The test data is not used: data that settings are chosen on gives a biased estimate of the result.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lora_kernels.finetune.advise.advise import HEAD_ONLY, train_only
from lora_kernels.finetune.advise.recipe import Recipe
from lora_kernels.finetune.tasks.base import Task
from lora_kernels.finetune.train.lora import LoRA
from lora_kernels.finetune.train.rng import seed_all
from lora_kernels.finetune.train.trainer import Trainer, TrainingError
from lora_kernels.planning.choose import use_backend

LORA, FULL = "LoRA", "full"
RUNGS = 3  # evenly spaced evaluations of a trial before its end
PARTIAL_ROWS = 256  # validation rows of such an evaluation; at least one batch

Watch = Callable[[int, float], bool]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a training.

    state: "complete", "pruned" or "diverged". value: the monitored metric on the validation data after the last epoch
    (the best one with early stopping); if pruned, of the last rung; if diverged, NaN. trainable: number of trained
    values. seconds: of the training steps only. wall: seconds in total. rows: size of the validation data.
    """

    state: str
    value: float
    trainable: int
    seconds: float
    wall: float
    rows: int


class _Pruned(Exception):
    def __init__(self, value: float) -> None:
        super().__init__(value)
        self.value = value


def run_trial(task: Task, recipe: Recipe, strategy: str = LORA, watch: Watch | None = None) -> Outcome:
    """Train ``task`` with ``recipe`` and validate it.

    strategy: LORA, FULL (all parameters are trained) or HEAD_ONLY; the last two ignore ``recipe.lora``.
    watch: called with the number of a rung (1 to RUNGS) and the metric there; returns whether to prune. It changes no
    random state, so a complete trial has the same result, bit for bit, with and without ``watch``.
    """
    with use_backend(recipe.backend):
        return _run(task, recipe, strategy, watch)


def _run(task: Task, recipe: Recipe, strategy: str, watch: Watch | None) -> Outcome:
    started = time.perf_counter()
    seed_all(recipe.seed)
    model = _model(task, recipe, strategy).to(recipe.device)
    if strategy != LORA:
        recipe = replace(recipe, loraplus=None)
    optimizer = recipe.optimizer(model)
    options = replace(recipe.options, seed=recipe.seed, checkpoint_dir=None, progress=False)
    trainer = Trainer(model, optimizer, task.criterion, recipe.device, options, metrics=task.metrics)
    loader, validation = task.loader("train", recipe.batch_size), task.loader("validation", recipe.batch_size)
    steps = recipe.epochs * math.ceil(len(loader) / options.accumulate)
    rungs = _Rungs(trainer, validation, steps, recipe.batch_size, watch)
    optimizer.register_step_post_hook(rungs)
    state, value, seconds = "complete", math.nan, 0.0
    try:
        history = trainer.train(loader, validation, recipe.epochs)
        value = history.epochs[-1][f"val_{options.monitor}"] if history.best is None else history.best
        seconds = history.seconds - rungs.seconds
    except _Pruned as pruned:
        state, value = "pruned", pruned.value
    except TrainingError:
        state = "diverged"
    if state == "complete" and not math.isfinite(value):
        state = "diverged"
    wall = time.perf_counter() - started
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Outcome(state, value, count, seconds or wall - rungs.seconds, wall, len(validation.dataset))


def _model(task: Task, recipe: Recipe, strategy: str) -> nn.Module:
    if strategy == LORA:
        return LoRA(task.load_model(), recipe.lora)
    model = task.load_model()
    return train_only(model, task.task_type) if strategy == HEAD_ONLY else model.requires_grad_(True)


class _Rungs:
    """An optimizer hook that evaluates a part of the validation data at each rung."""

    def __init__(self, trainer: Trainer, validation: Any, steps: int, batch_size: int, watch: Watch | None) -> None:
        self.trainer, self.validation, self.watch = trainer, validation, watch
        self.rungs = {steps * i // (RUNGS + 1): i for i in range(1, RUNGS + 1)} if steps > RUNGS else {}
        self.every = max(1, len(validation) // max(1, PARTIAL_ROWS // batch_size))
        self.step, self.seconds = 0, 0.0

    def __call__(self, *hook_arguments: Any) -> None:
        self.step += 1
        rung = self.rungs.get(self.step)
        if rung is None or self.watch is None:
            return
        started = time.perf_counter()
        value = self.trainer.evaluate(self._part())[self.trainer.options.monitor]
        self.seconds += time.perf_counter() - started
        if self.watch(rung, value):
            raise _Pruned(value)

    def _part(self) -> Iterator[Any]:
        """Yield every ``every``-th batch.

        A generator, since iter(DataLoader) draws a random number and must run after ``evaluate`` saved the state.
        """
        yield from itertools.islice(self.validation, 0, None, self.every)
