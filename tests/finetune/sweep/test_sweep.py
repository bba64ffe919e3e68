"""The search with a formula in place of training: proposals, pruning, repetitions, and resuming after a kill."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kernels.errors import ConfigError
from lora_kernels.finetune.sweep import sweep as module
from lora_kernels.finetune.sweep.sweep import Axis, Plan, Record, Sweep, spread
from lora_kernels.finetune.sweep.trial import FULL, HEAD_ONLY, LORA, Outcome
from lora_kernels.finetune.train.options import TrainOptions

SPACE = {"r": Axis((2, 4, 8)), "lr": Axis(low=1e-4, high=1e-1)}
FIRST = {"r": 4, "lr": 1e-3}


@dataclasses.dataclass
class Fake:
    """Replaces a recipe and its training by a formula: the best lr is 0.01, and a larger rank is a little better."""

    params: dict
    seed: int
    options: TrainOptions = dataclasses.field(default_factory=lambda: TrainOptions(monitor="loss"))

    @property
    def value(self):
        return abs(math.log10(self.params["lr"] / 0.01)) + 0.1 / self.params["r"] + 0.001 * self.seed


def fake_trial(task, recipe, strategy=LORA, watch=None):
    for rung in (1, 2, 3):
        if watch and watch(rung, recipe.value + 1 / rung):
            glance = recipe.value / 1000  # better than any final value: it must not count
            return Outcome("pruned", glance, 10 * recipe.params["r"] + rung, 0.1, 1.0, 100)
    if recipe.params["lr"] > 0.09:
        return Outcome("diverged", math.nan, 1, 0.1, 1.0, 100)
    return Outcome("complete", recipe.value, 10 * recipe.params["r"], 0.1, 1.0, 100)


def plan(**changes):
    given = {
        "first": FIRST,
        "budget": 1e6,
        "trials": 14,
        "seed": 0,
        "repeats": 2,
        "baselines": {},
        "settings": {"a": 1},
    }
    return Plan(SPACE, **given | changes)


class Rows:
    """The part of the Task interface that a sweep uses."""

    def __init__(self, rows):
        self.rows = list(rows)

    def loader(self, part, batch_size):
        return self.rows


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "run_trial", fake_trial)

    def make(folder="a", rows=(1, 2), **changes):
        return Sweep(Rows(rows), plan(**changes), Fake, tmp_path / folder)

    return make


def trials(sweep):
    return [(r.kind, r.params, r.seed, r.outcome) for r in sweep.records()]


def test_finds_the_valley_and_repeats_the_best(made):
    said = []
    sweep = made(baselines={FULL: [1e-3, 1e-2], HEAD_ONLY: [1e-2]})
    sweep.run(said.append)
    records = sweep.records()
    kinds = [record.kind for record in records]
    assert kinds == [LORA] * 14 + [FULL] * 2 + [HEAD_ONLY] + [f"{LORA}, repeated"] * 2
    assert records[0].params == FIRST
    best = sweep.best()
    assert best.outcome.value == min(r.outcome.value for r in records[:14] if r.outcome.state == "complete") < 0.3
    assert [(r.params, r.seed) for r in records[-2:]] == [(best.params, 1), (best.params, 2)]
    assert [r.params for r in records[14:17]] == [{"lr": 1e-3}, {"lr": 1e-2}, {"lr": 1e-2}]
    assert any(r.outcome.state == "pruned" for r in records)
    assert len(said) == len(records)
    assert "trial 1: complete, loss " in said[0]
    glanced = [r for r in records if r.outcome.state == "pruned"]
    assert {r.outcome.trainable % 10 for r in glanced} <= {2, 3}  # the rung at which it was pruned: not the first
    late = [r.outcome.value for r in records[9:14] if r.outcome.state == "complete"]
    assert spread(late)[0] < spread([r.outcome.value for r in records[:8] if r.outcome.state == "complete"])[0]


def test_a_seed_is_a_search(made):
    runs = [made(folder, seed=seed, trials=3) for folder, seed in (("a", 0), ("b", 0), ("c", 1))]
    for sweep in runs:
        sweep.run(lambda line: None)
    assert trials(runs[0]) == trials(runs[1])
    assert [r.params for r in runs[0].records()][1:] != [r.params for r in runs[2].records()][1:]


def test_stopped_anywhere_it_goes_on_to_the_same_trials(made, monkeypatch):
    whole, calls = made("whole"), []
    whole.run(lambda line: None)

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) in (1, 4, 10, 18):  # the first, some proposed by random, by the estimator, a repetition
            raise KeyboardInterrupt
        return fake_trial(*args, **kwargs)

    monkeypatch.setattr(module, "run_trial", interrupted)
    stops = 0
    while True:
        sweep = made("parts")
        try:
            sweep.run(lambda line: None)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops == 4
    assert trials(sweep) == trials(whole)


def test_the_budget_is_kept_but_for_the_first_trial(made, monkeypatch):
    clock = [0.0]

    def slow(*args, **kwargs):
        clock[0] += 1.0  # a fake trial's wall
        return fake_trial(*args, **kwargs)

    monkeypatch.setattr(module, "run_trial", slow)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    for budget, expected in ((0.5, [LORA]), (9.5, [LORA] * 7 + [f"{LORA}, repeated"] * 2)):
        clock[0] = 0.0
        sweep = made(f"{budget}", budget=budget)
        sweep.run(lambda line: None)
        assert [r.kind for r in sweep.records()] == expected
        assert clock[0] <= max(budget, 1.0)
    sweep = made("starved", budget=12.0, baselines={FULL: [1e-3] * 1 + [1e-4 * i for i in range(1, 9)]})
    clock[0] = 0.0
    sweep.run(lambda line: None)
    assert sum(r.kind == FULL for r in sweep.records()) == 5  # half the budget stays with the search
    assert clock[0] <= 12.0


def test_more_trials_may_be_asked_for_but_no_other_settings(made):
    made(trials=3).run(lambda line: None)
    sweep = made(trials=5, repeats=0, budget=50.0)
    sweep.run(lambda line: None)
    assert sum(r.kind == LORA for r in sweep.records()) == 5
    with pytest.raises(ConfigError, match="under other settings: a, seed differ"):
        made(seed=7, settings={"a": 2})
    with pytest.raises(ConfigError, match="sha256 of the test data, sha256 of the train data, sha256 of the val"):
        made(rows=(1, 3))


def test_a_better_best_is_repeated_anew(made):
    made(trials=1).run(lambda line: None)
    sweep = made(trials=12)
    sweep.run(lambda line: None)
    repeated = [r.params for r in sweep.records() if r.kind != LORA]
    assert repeated == [FIRST, FIRST, sweep.best().params, sweep.best().params]


def test_accuracies_are_maximised(tmp_path):
    accuracy = TrainOptions(monitor="accuracy")
    sweep = Sweep(Rows((1, 2)), plan(), lambda params, seed: Fake(params, seed, accuracy), tmp_path)
    assert sweep.badness(Record(LORA, {}, 0, Outcome("complete", 0.7, 1, 1.0, 1.0, 1))) == -0.7
    assert sweep.search.direction.name == "MAXIMIZE"


@pytest.mark.parametrize("change", [{"trials": 0}, {"budget": 0.0}, {"repeats": -1}])
def test_a_plan_that_learns_nothing_is_refused(change):
    with pytest.raises(ConfigError, match="nothing can be learnt"):
        plan(**change)


def test_axes():
    assert Axis((1, 2)).holds(2)
    assert not Axis((1, 2)).holds(3)
    assert Axis(low=1e-4, high=1e-2).holds(1e-3)
    with pytest.raises(ConfigError, match="must rise"):
        Axis(low=0.1, high=0.01)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_sweep as t
from lora_kernels.finetune.sweep import sweep as module
done = []
def dying(*args, **kwargs):
    done.append(1)
    if len(done) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return t.fake_trial(*args, **kwargs)
module.run_trial = dying
module.Sweep(t.Rows((1, 2)), t.plan(), t.Fake, Path({out!r})).run(lambda line: None)
"""


@pytest.mark.slow
def test_kill_9_and_resume_ends_the_same(made, tmp_path):
    whole = made("whole")
    whole.run(lambda line: None)
    for at in (10, 99):
        code = KILLED.format(tests=str(Path(__file__).parent), at=at, out=str(tmp_path / "parts"))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == (0 if at == 99 else -signal.SIGKILL), done.stderr
    assert trials(made("parts")) == trials(whole)
