"""The search for a strategy and its parameters: optuna proposes, the Trainer trains, the validation data judges.

What a trial is depends on the seed and on the trials finished before it alone, and the study lies in a SQLite file. So
a sweep killed at any moment goes on to the trials it would have had.
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
STARTUP = 8  # trials drawn at random before the Parzen estimator has something to go by
JUDGED = 4  # complete trials before one may be given up
KEPT = 66.0  # per cent of them that a trial must be among, at the same rung, to go on
FIRST_RUNG = 2  # that may end one; before, during the warm-up, most are still guessing
Params = dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """One parameter's values: ``choices``, or all numbers from ``low`` to ``high``, drawn on a logarithmic scale."""

    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0

    def __post_init__(self) -> None:
        if not self.choices and not 0 < self.low <= self.high:
            raise ConfigError(f"a range from {self.low} to {self.high}: it must rise, from above 0")

    def holds(self, value: Any) -> bool:
        """Whether ``value`` may be proposed."""
        return value in self.choices if self.choices else self.low <= value <= self.high

    def suggest(self, trial: Any, name: str) -> Any:
        """The trial's value of this parameter."""
        if self.choices:
            return trial.suggest_categorical(name, self.choices)
        return trial.suggest_float(name, self.low, self.high, log=True)


@dataclass(frozen=True)
class Record:
    """A finished training: what it was and what came of it. kind: "LoRA", "full" or "head only"; "LoRA, repeated" for
    the best parameters with another seed. The rest: see Outcome."""

    kind: str
    params: Params
    seed: int
    outcome: Outcome


@dataclass(frozen=True)
class Plan:
    """What a sweep does. ConfigError for a plan without a trial.

    space: parameter -> its values. first: parameters of the first trial, where they lie in the space. budget: seconds
    after which nothing is begun, and before which what is begun is expected to end. trials: at most so many. repeats:
    how many other seeds the best parameters are tried with. baselines: strategy (FULL, HEAD_ONLY) -> learning rates.
    settings: what else decides the results; a study made under others is not resumed.
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
        """The decisive part as JSON: budget, number of trials and of repeats may change from call to call."""
        space = {name: asdict(axis) for name, axis in self.space.items()}
        return json.dumps({"space": space, "first": self.first, "seed": self.seed, **self.settings}, sort_keys=True)


class Sweep:
    """A sweep in a folder. ``recipe_for(params, seed)`` makes a recipe of parameters; less is better of a loss."""

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
        pruner = self.optuna.pruners.PercentilePruner(KEPT, n_startup_trials=JUDGED, n_warmup_steps=FIRST_RUNG)
        with usable(self._file, KeyError, TypeError, ValueError):
            common = {
                "storage": storage(self._file),
                "direction": "minimize" if self.lower else "maximize",
                "load_if_exists": True,
            }
            self.search = self.optuna.create_study(study_name="search", pruner=pruner, **common)
            self.beside = self.optuna.create_study(study_name="beside", **common)
            self._begin()
            self._searched, self._others = (self._read(study) for study in (self.search, self.beside))

    def _begin(self) -> None:
        facts, now = self.search.user_attrs.get("facts"), self._facts
        if facts is not None and (then := json.loads(facts)) != now:
            other = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
            raise ConfigError(f"the study was made under other settings: {', '.join(other)} differ")
        self.search.set_user_attr("facts", json.dumps(now, sort_keys=True))
        for study in (self.search, self.beside):
            for trial in study.get_trials(deepcopy=False, states=(self.optuna.trial.TrialState.RUNNING,)):
                study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL)  # it was running when killed

    def records(self) -> list[Record]:
        """What has been finished, trials first."""
        return [*self._searched, *self._others]

    @staticmethod
    def _read(study: Any) -> list[Record]:
        found = []
        for trial in study.get_trials(deepcopy=False):
            if trial.state.name in ("COMPLETE", "PRUNED"):  # neither failed nor waiting
                told = json.loads(trial.user_attrs["record"])
                found.append(Record(**told | {"outcome": Outcome(**told["outcome"])}))
        return found

    def best(self) -> Record | None:
        """The complete trial with the best value, the earliest of equals."""
        complete = [record for record in self._searched if record.outcome.state == "complete"]
        return min(complete, key=self.badness) if complete else None

    def badness(self, record: Record) -> float:
        """The value, signed so that less is better."""
        return record.outcome.value if self.lower else -record.outcome.value

    def run(self, say: Say = print) -> None:
        """Trains until the budget or the number of trials is used up. What is finished is on the disk at once."""
        with usable(self._file):
            self._run(say)

    def _run(self, say: Say) -> None:
        started, plan = time.monotonic(), self.plan

        def left() -> float:
            return plan.budget - (time.monotonic() - started)

        while (done := len(self._searched)) < plan.trials:
            repeats = 0 if done == 0 else plan.repeats  # the best is still to be tried with other seeds
            if left() < (1 + repeats) * self._longest(LORA) and done:
                break
            say(self.told(self._trial(done), done + 1))
            if not done:
                self._baselines(left, say)
        best = self.best()
        for seed in range(plan.seed + 1, plan.seed + 1 + plan.repeats if best else 0):
            kind = f"{LORA}, repeated"
            if best and not self._known(kind, best.params, seed) and left() >= self._longest(LORA):
                say(self.told(self._beside(kind, best.params, seed)))

    def _trial(self, done: int) -> Record:
        plan, states = self.plan, self.optuna.trial.TrialState
        known = all(axis.holds(plan.first[name]) for name, axis in plan.space.items())
        if known and not done and not self.search.get_trials(deepcopy=False, states=(states.WAITING,)):
            self.search.enqueue_trial({name: plan.first[name] for name in plan.space})
        # a generator that depends on how many were finished, not on how many times the process was killed
        self.search.sampler = self.optuna.samplers.TPESampler(seed=plan.seed + done, n_startup_trials=STARTUP)
        trial = self.search.ask()
        params = {name: axis.suggest(trial, name) for name, axis in plan.space.items()}

        def watch(rung: int, value: float) -> bool:
            if math.isfinite(value):
                trial.report(value, rung)
            return not math.isfinite(value) or trial.should_prune()

        outcome = run_trial(self.task, self.recipe_for(params, plan.seed), LORA, watch)
        record = Record(LORA, params, plan.seed, outcome)
        trial.set_user_attr("record", json.dumps(asdict(record)))
        if outcome.state == "complete":
            self.search.tell(trial, outcome.value)
        else:
            self.search.tell(trial, state=states.PRUNED)
        self._searched.append(record)
        return record

    def _baselines(self, left: Callable[[], float], say: Say) -> None:
        for kind, rates in self.plan.baselines.items():
            for lr in rates:
                params = {"lr": lr}
                expected = self._longest(kind) or 2 * self._longest(LORA)
                half = self.plan.budget / 2  # the search gets at least that
                if not self._known(kind, params, self.plan.seed) and left() - expected >= half:
                    say(self.told(self._beside(kind, params, self.plan.seed)))

    def _beside(self, kind: str, params: Params, seed: int) -> Record:
        trial = self.beside.ask()
        recipe = self.recipe_for({**self.plan.first, **params}, seed)
        outcome = run_trial(self.task, recipe, kind if kind in (FULL, HEAD_ONLY) else LORA)
        record = Record(kind, params, seed, outcome)
        trial.set_user_attr("record", json.dumps(asdict(record)))
        if outcome.state == "complete":
            self.beside.tell(trial, outcome.value)
        else:
            self.beside.tell(trial, state=self.optuna.trial.TrialState.PRUNED)
        self._others.append(record)
        return record

    def _known(self, kind: str, params: Params, seed: int) -> bool:
        return any((r.kind, r.params, r.seed) == (kind, params, seed) for r in self.records())

    def _longest(self, kind: str) -> float:
        """Seconds of the longest of the last five trainings of a kind: what the next one may take."""
        return max([r.outcome.wall for r in self.records() if r.kind.startswith(kind)][-5:], default=0.0)

    def told(self, record: Record, number: int = 0) -> str:
        """A finished training in a line."""
        what = f"trial {number}" if number else f"{record.kind}, seed {record.seed}"
        figure = "" if record.outcome.state == "diverged" else f" {self.monitor} {record.outcome.value:.4f}"
        params = ", ".join(f"{name} {show(value)}" for name, value in record.params.items())
        return f"{what}: {record.outcome.state},{figure} in {record.outcome.wall:.1f} s; {params}"


def show(value: Any) -> str:
    """A parameter for people: three digits of a float."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of a sample; 0 for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
