"""Hyper-parameter search: optuna proposes parameters, the Trainer trains, trials are compared on validation data.

A trial's parameters depend only on the seed and on the finished trials, and the study is stored in a SQLite file. So a
sweep that is killed at any moment and resumed runs the same trials.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_kernels.errors import ConfigError
from lora_kernels.finetune.advise.advise import HEAD_ONLY
from lora_kernels.finetune.advise.recipe import Recipe, Say
from lora_kernels.finetune.sweep.study import storage, usable
from lora_kernels.finetune.sweep.trial import FULL, LORA, Outcome, run_trial
from lora_kernels.finetune.tasks.base import PARTS, Task
from lora_kernels.finetune.train.digest import data_digest
from lora_kernels.finetune.train.extras import require

DATABASE = "sweep.db"
RANDOM_TRIALS = 8  # before the Parzen estimator is used
TRIALS_BEFORE_PRUNING = 4  # complete ones
KEPT_PERCENTILE = 66.0  # a trial outside the best 66 % at the same rung is pruned
FIRST_RUNG = 2  # the first rung at which trials are pruned; rung 1 may be within the warm-up
Params = dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """The values of a parameter: ``choices``, or numbers from ``low`` to ``high`` on a logarithmic scale."""

    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0

    def __post_init__(self) -> None:
        if not self.choices and not 0 < self.low <= self.high:
            raise ConfigError(f"a range from {self.low} to {self.high}: it must rise, from above 0")

    def holds(self, value: Any) -> bool:
        """Check whether ``value`` is on this axis."""
        return value in self.choices if self.choices else self.low <= value <= self.high

    def suggest(self, trial: Any, name: str) -> Any:
        """Draw the trial's value of this parameter."""
        if self.choices:
            return trial.suggest_categorical(name, self.choices)
        return trial.suggest_float(name, self.low, self.high, log=True)


@dataclass(frozen=True)
class Record:
    """A finished training with its parameters and outcome. kind: "LoRA", "full" or "head only"; "LoRA, repeated" for
    the best parameters with another seed."""

    kind: str
    params: Params
    seed: int
    outcome: Outcome


@dataclass(frozen=True)
class Plan:
    """The plan of a sweep. Raises ConfigError for a plan without a trial.

    space: parameter -> its values. first: parameters of the first trial, if they are in the space. budget: seconds; a
    training starts only if it is expected to end within them. trials: most trials. repeats: number of other seeds for
    the best parameters. baselines: strategy (FULL, HEAD_ONLY) -> learning rates. settings: further values that decide
    the results; a study made under others is not resumed.
    """

    space: Mapping[str, Axis]
    first: Params
    budget: float
    trials: int
    seed: int
    repeats: int
    baselines: Mapping[str, Sequence[float]]
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.trials < 1 or not self.budget > 0 or self.repeats < 0:
            raise ConfigError(f"{self.trials} trials in {self.budget} s, {self.repeats} repeats: nothing can be learnt")

    def facts(self) -> str:
        """Return the values that must not change on resume, as JSON. Budget, trials and repeats may change."""
        space = {name: asdict(axis) for name, axis in self.space.items()}
        return json.dumps({"space": space, "first": self.first, "seed": self.seed, **self.settings}, sort_keys=True)


class Sweep:
    """A sweep with its study in folder ``out``. ``recipe_for(params, seed)`` makes a recipe."""

    def __init__(self, task: Task, plan: Plan, recipe_for: Callable[[Params, int], Recipe], out: Path) -> None:
        self.task, self.plan, self.recipe_for = task, plan, recipe_for
        digests = {f"sha256 of the {part} data": data_digest(task.loader(part, 1)) for part in PARTS}
        self._facts = json.loads(plan.facts()) | digests
        self.optuna = require("optuna")
        self.optuna.logging.set_verbosity(self.optuna.logging.WARNING)
        out.mkdir(parents=True, exist_ok=True)
        self.monitor = recipe_for(plan.first, plan.seed).options.monitor
        self.lower = self.monitor == "loss"
        self._file = out / DATABASE
        pruner = self.optuna.pruners.PercentilePruner(
            KEPT_PERCENTILE, n_startup_trials=TRIALS_BEFORE_PRUNING, n_warmup_steps=FIRST_RUNG
        )
        with usable(self._file, KeyError, TypeError, ValueError):
            common = {
                "storage": storage(self._file),
                "direction": "minimize" if self.lower else "maximize",
                "load_if_exists": True,
            }
            self.search = self.optuna.create_study(study_name="search", pruner=pruner, **common)
            self.extra = self.optuna.create_study(study_name="beside", **common)
            self._begin()
            self._searched, self._others = (self._read(study) for study in (self.search, self.extra))

    def _begin(self) -> None:
        facts, now = self.search.user_attrs.get("facts"), self._facts
        if facts is not None and (then := json.loads(facts)) != now:
            other = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
            raise ConfigError(f"the study was made under other settings: {', '.join(other)} differ")
        self.search.set_user_attr("facts", json.dumps(now, sort_keys=True))
        for study in (self.search, self.extra):
            for trial in study.get_trials(deepcopy=False, states=(self.optuna.trial.TrialState.RUNNING,)):
                study.tell(
                    trial.number, state=self.optuna.trial.TrialState.FAIL
                )  # the sweep was killed during this trial

    def records(self) -> list[Record]:
        """Return the finished trainings, trials first."""
        return [*self._searched, *self._others]

    @staticmethod
    def _read(study: Any) -> list[Record]:
        found = []
        for trial in study.get_trials(deepcopy=False):
            if trial.state.name in ("COMPLETE", "PRUNED"):  # neither failed nor waiting
                saved = json.loads(trial.user_attrs["record"])
                found.append(Record(**saved | {"outcome": Outcome(**saved["outcome"])}))
        return found

    def best(self) -> Record | None:
        """Return the complete trial with the best value; of equal values, the first."""
        complete = [record for record in self._searched if record.outcome.state == "complete"]
        return min(complete, key=self.badness) if complete else None

    def badness(self, record: Record) -> float:
        """Return the value with the sign that makes lower better."""
        return record.outcome.value if self.lower else -record.outcome.value

    def run(self, say: Say = print) -> None:
        """Train until the budget or the number of trials is used up. Each finished training is saved at once."""
        with usable(self._file):
            self._run(say)

    def _run(self, say: Say) -> None:
        started, plan = time.monotonic(), self.plan

        def left() -> float:
            return plan.budget - (time.monotonic() - started)

        while (done := len(self._searched)) < plan.trials:
            repeats = 0 if done == 0 else plan.repeats  # reserve time for the other seeds of the best
            if left() < (1 + repeats) * self._longest(LORA) and done:
                break
            say(self.line(self._trial(done), done + 1))
            if not done:
                self._baselines(left, say)
        best = self.best()
        for seed in range(plan.seed + 1, plan.seed + 1 + plan.repeats if best else 0):
            kind = f"{LORA}, repeated"
            if best and not self._known(kind, best.params, seed) and left() >= self._longest(LORA):
                say(self.line(self._train_extra(kind, best.params, seed)))

    def _trial(self, done: int) -> Record:
        plan, states = self.plan, self.optuna.trial.TrialState
        known = all(axis.holds(plan.first[name]) for name, axis in plan.space.items())
        if known and not done and not self.search.get_trials(deepcopy=False, states=(states.WAITING,)):
            self.search.enqueue_trial({name: plan.first[name] for name in plan.space})
        # the seed depends on the number of finished trials, not on interruptions
        self.search.sampler = self.optuna.samplers.TPESampler(seed=plan.seed + done, n_startup_trials=RANDOM_TRIALS)
        trial = self.search.ask()
        params = {name: axis.suggest(trial, name) for name, axis in plan.space.items()}

        def watch(rung: int, value: float) -> bool:
            if math.isfinite(value):
                trial.report(value, rung)
            return not math.isfinite(value) or trial.should_prune()

        outcome = run_trial(self.task, self.recipe_for(params, plan.seed), LORA, watch)
        return self._finish(self.search, trial, Record(LORA, params, plan.seed, outcome))

    def _finish(self, study: Any, trial: Any, record: Record) -> Record:
        """Save the record of a training in its study."""
        trial.set_user_attr("record", json.dumps(asdict(record)))
        if record.outcome.state == "complete":
            study.tell(trial, record.outcome.value)
        else:
            study.tell(trial, state=self.optuna.trial.TrialState.PRUNED)
        (self._searched if study is self.search else self._others).append(record)
        return record

    def _baselines(self, left: Callable[[], float], say: Say) -> None:
        for kind, rates in self.plan.baselines.items():
            for lr in rates:
                params = {"lr": lr}
                expected = self._longest(kind) or 2 * self._longest(LORA)
                half = self.plan.budget / 2  # reserved for the search
                if not self._known(kind, params, self.plan.seed) and left() - expected >= half:
                    say(self.line(self._train_extra(kind, params, self.plan.seed)))

    def _train_extra(self, kind: str, params: Params, seed: int) -> Record:
        trial = self.extra.ask()
        recipe = self.recipe_for({**self.plan.first, **params}, seed)
        outcome = run_trial(self.task, recipe, kind if kind in (FULL, HEAD_ONLY) else LORA)
        return self._finish(self.extra, trial, Record(kind, params, seed, outcome))

    def _known(self, kind: str, params: Params, seed: int) -> bool:
        return any((r.kind, r.params, r.seed) == (kind, params, seed) for r in self.records())

    def _longest(self, kind: str) -> float:
        """Return the seconds of the longest of the last five trainings of a kind, to estimate the next one."""
        return max([r.outcome.wall for r in self.records() if r.kind.startswith(kind)][-5:], default=0.0)

    def line(self, record: Record, number: int = 0) -> str:
        """Describe a finished training in one line."""
        title = f"trial {number}" if number else f"{record.kind}, seed {record.seed}"
        figure = "" if record.outcome.state == "diverged" else f" {self.monitor} {record.outcome.value:.4f}"
        params = ", ".join(f"{name} {show(value)}" for name, value in record.params.items())
        return f"{title}: {record.outcome.state},{figure} in {record.outcome.wall:.1f} s; {params}"


def show(value: Any) -> str:
    """Format a parameter; floats with three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Compute mean and sample standard deviation (0 for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
