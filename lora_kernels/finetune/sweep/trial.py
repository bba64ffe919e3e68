"""One training of a sweep: like ``recipe.run`` up to the last validation, watched on the way, nothing written.

The test data is never looked at: a sweep chooses, and what it chooses by is no longer a fair judge.
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
RUNGS = 3  # how often a trial is judged before its end, at even distances
GLANCE = 256  # rows of the validation data that such a judgement looks at, at least a batch

Watch = Callable[[int, float], bool]


@dataclass(frozen=True)
class Outcome:
    """value: the monitored metric on the validation data after the last epoch (the best one with early stopping).

    state: "complete", "pruned" (``value`` is then the last glance's) or "diverged" (NaN). trainable: values trained.
    seconds: of the training steps alone. wall: of everything. rows: size of the validation data.
    """

    state: str
    value: float
    trainable: int
    seconds: float
    wall: float
    rows: int


class _GivenUp(Exception):
    def __init__(self, value: float) -> None:
        super().__init__(value)
        self.value = value


def run_trial(task: Task, recipe: Recipe, strategy: str = LORA, watch: Watch | None = None) -> Outcome:
    """Trains ``task`` by ``recipe`` and validates it.

    strategy: LORA, FULL (every parameter is trained) or HEAD_ONLY; the last two pass over ``recipe.lora``.
    watch: given the number of a rung (from 1 to RUNGS) and the metric there, says whether to give up. Watching changes
    no random number, so a watched trial that goes through ends with the same bits as one that nobody watched.
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
    glances = _Glances(trainer, validation, steps, recipe.batch_size, watch)
    optimizer.register_step_post_hook(glances)
    state, value, seconds = "complete", math.nan, 0.0
    try:
        history = trainer.train(loader, validation, recipe.epochs)
        value = history.epochs[-1][f"val_{options.monitor}"] if history.best is None else history.best
        seconds = history.seconds - glances.seconds
    except _GivenUp as given_up:
        state, value = "pruned", given_up.value
    except TrainingError:
        state = "diverged"
    if state == "complete" and not math.isfinite(value):
        state = "diverged"
    wall = time.perf_counter() - started
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Outcome(state, value, count, seconds or wall - glances.seconds, wall, len(validation.dataset))


def _model(task: Task, recipe: Recipe, strategy: str) -> nn.Module:
    if strategy == LORA:
        return LoRA(task.load_model(), recipe.lora)
    model = task.load_model()
    return train_only(model, task.task_type) if strategy == HEAD_ONLY else model.requires_grad_(True)


class _Glances:
    """After the optimizer steps that end a part of the training, a look at a part of the validation data."""

    def __init__(self, trainer: Trainer, validation: Any, steps: int, batch_size: int, watch: Watch | None) -> None:
        self.trainer, self.validation, self.watch = trainer, validation, watch
        self.rungs = {steps * i // (RUNGS + 1): i for i in range(1, RUNGS + 1)} if steps > RUNGS else {}
        self.every = max(1, len(validation) // max(1, GLANCE // batch_size))
        self.step, self.seconds = 0, 0.0

    def __call__(self, *of_the_hook: Any) -> None:
        self.step += 1
        rung = self.rungs.get(self.step)
        if rung is None or self.watch is None:
            return
        started = time.perf_counter()
        value = self.trainer.evaluate(self._part())[self.trainer.options.monitor]
        self.seconds += time.perf_counter() - started
        if self.watch(rung, value):
            raise _GivenUp(value)

    def _part(self) -> Iterator[Any]:
        """Every so many batches. A generator: a DataLoader draws a random number as soon as it is iterated over, which
        has to be when ``evaluate`` has put the random state aside."""
        yield from itertools.islice(self.validation, 0, None, self.every)
