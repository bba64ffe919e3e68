"""``lora-kernels sweep``: search for the best strategy and parameters for a model and data."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lora_kernels.atomic_write import atomic_write
from lora_kernels.cli import train
from lora_kernels.cli.tables import aligned
from lora_kernels.cli.train import INITS
from lora_kernels.errors import ConfigError
from lora_kernels.finetune import values
from lora_kernels.finetune.advise.advise import HEAD_ONLY, target_sets
from lora_kernels.finetune.advise.recipe import Recipe
from lora_kernels.finetune.sweep.report import chance, plot, write_csv
from lora_kernels.finetune.sweep.sweep import DATABASE, Axis, Params, Plan, Record, Sweep, show
from lora_kernels.finetune.sweep.trial import FULL, LORA
from lora_kernels.finetune.tasks import TASKS, Task
from lora_kernels.models.targets import TASK_HEADS

RSLORA = "rslora"
# Options that do not belong to train, or do not decide the results of a search.
_OWN = ("budget", "trials", "repeats", "baselines", "full_lr", "head_lr", "command", "run")
_AXES = ("r", "alpha", "dropout", "targets", "init", "lr", "loraplus")
_OUTPUT = ("resume", "overwrite", "out", "quiet", "beside_peft", "checkpoint_every", "no_checkpoints", "timeout")


def add_parser(subparsers: Any, task: type[Task]) -> None:
    """Declare the command: train's options, with several values for those that are searched."""
    summary = "search for the best rank, targets, learning rate and more"
    parser = subparsers.add_parser("sweep", help=summary, allow_abbrev=False, conflict_handler="resolve")
    train.add_arguments(parser, task)
    add = parser.add_argument
    add("--out", type=values.output_folder, help="folder for the results (default: out/sweep)")
    add("--seed", type=values.whole(0, values.MAX_SPLIT_SEED // 2), default=0)
    study = parser.add_mutually_exclusive_group().add_argument
    study("--resume", action="store_true", help="continue the study in --out for another --budget")
    study("--overwrite", action="store_true", help="delete the study in --out")
    space = parser.add_argument_group("search space, one or more values each").add_argument
    space("--r", type=values.rank, nargs="+", default=[4, 8, 16, 32], help="ranks (default: 4 8 16 32)")
    space("--alpha", type=_alpha, nargs="+", default=["1r", "2r", "4r"],
          help="numbers, or multiples of r (default: 1r 2r 4r)")  # fmt: skip
    space("--dropout", type=values.probability, nargs="+", default=[0.0, 0.1], help="default: 0 0.1")
    space("--targets", nargs="+", metavar="SET",
          help="q,v, attention, mlp, all-linear, or as in train (default: q,v attention all-linear)")  # fmt: skip
    space("--init", nargs="+", choices=[*sorted(INITS), RSLORA], default=["default", "pissa", "olora", RSLORA],
          help="of A and B; rslora: default with alpha / sqrt(r) (default: default pissa olora rslora)")  # fmt: skip
    space("--lr", "--learning-rate", type=_rate, nargs="+", default=["1e-4:1e-2"], metavar="RATE", dest="lr",
          help="learning rates, or LOW:HIGH (default: 1e-4:1e-2)")  # fmt: skip
    space("--loraplus", type=values.real(0.0), nargs="+", default=[1.0], metavar="RATIO",
          help="learning rate of B over that of A (default: 1)")  # fmt: skip
    search = parser.add_argument_group("search").add_argument
    search("--budget", type=values.seconds, default=600.0, metavar="SECONDS",
           help="start only trainings that are expected to end within it (default: 600)")  # fmt: skip
    search("--trials", type=values.count, default=100, help="most trials (default: %(default)s)")
    search("--repeats", type=values.whole(), default=2,
           help="other seeds for the best parameters (default: %(default)s)")  # fmt: skip
    search("--baselines", action="store_true", help="also run full fine-tuning, and the head alone")
    search(
        "--full-lr", type=values.rate, nargs="+", default=[3e-5, 1e-4, 3e-4], help="learning rates of full fine-tuning"
    )
    search("--head-lr", type=values.rate, nargs="+", default=[1e-3, 1e-2], help="learning rates of the head alone")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Search. Write sweep.csv, sweep.png, sweep.svg, the study and the best command to --out."""
    out = arguments.out or Path("out/sweep")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    task_type = TASKS[arguments.task]
    task = task_type.from_arguments(arguments)
    if (out / DATABASE).exists() and not arguments.resume:
        if not arguments.overwrite:
            raise ConfigError(f"{out} holds the study of an earlier sweep: --resume it, or --overwrite it")
        (out / DATABASE).unlink()
    sets = {name: _line(targets) for name, targets in target_sets(task.load_model(), task_type.task_type).items()}
    base = train_defaults(arguments, task_type)
    space = space_of(arguments, sets)

    def settings(params: Params, seed: int) -> argparse.Namespace:
        return settings_of(base, sets, params, seed)

    def recipe_for(params: Params, seed: int) -> Recipe:
        return train.recipe_of(settings(params, seed), task_type, None)

    decisive = {name: value for name, value in vars(arguments).items() if name not in (*_OWN, *_AXES, *_OUTPUT)}
    decisive |= {"sets": sets, "threads": torch.get_num_threads(), "device": train.find_device(arguments.device)}
    plan = Plan(
        space=space,
        first=first_of(space),
        budget=arguments.budget,
        trials=arguments.trials,
        seed=arguments.seed,
        repeats=arguments.repeats,
        baselines=baselines_of(arguments, task_type.task_type),
        settings=task.settings() | decisive,
    )
    for name in sorted(space):  # report invalid values before the search
        for value in space[name].choices:
            recipe_for({**plan.first, name: value}, plan.seed)
    print(task.describe_data())
    sweep = Sweep(task, plan, recipe_for, out)
    sweep.run()
    records, best = sweep.records(), sweep.best()
    commands = {i: train.reproduce(_in(settings(r.params, r.seed), out / f"trial-{i + 1}"))
                for i, r in enumerate(records) if r.kind.startswith(LORA)}  # fmt: skip
    write_csv(records, out / "sweep.csv", commands)
    pictures = [out / "sweep.png", out / "sweep.svg"]
    plot(records, pictures, sweep.monitor, sweep.lower, lambda record: str(record.params.get("targets", "")))
    print(f"\n{table(sorted(records, key=_order(sweep)), sweep.monitor)}\n")
    if best is None:
        raise ConfigError("no trial was completed: lower the learning rates, or give a larger budget")
    print("\n".join(chance(best, records, sweep.monitor, sweep.lower)))
    print(f"by the validation data of {best.outcome.rows:,} rows; the test data has not been looked at")
    command = train.reproduce(_in(settings(best.params, best.seed), out / "best"))
    atomic_write(out / "best.sh", f"{command}\n".encode())
    print(f"results: {out}/sweep.csv, {out}/sweep.png, {out}/sweep.svg\nthe best again, and its test: {command}")
    return 0


def train_defaults(arguments: argparse.Namespace, task: type[Task]) -> argparse.Namespace:
    """Return train's options: its defaults, and the values of this command line outside the search space."""
    parser = argparse.ArgumentParser()
    train.add_arguments(parser, task)
    settings = parser.parse_args([])
    kept = {name: value for name, value in vars(arguments).items() if name in vars(settings) and name not in _AXES}
    vars(settings).update(kept | {"resume": False, "overwrite": False, "no_checkpoints": True, "quiet": False})
    return settings


def settings_of(base: argparse.Namespace, sets: dict[str, str], params: Params, seed: int) -> argparse.Namespace:
    """Return train's options for a trial's parameters. sets: name of a target set -> value of --targets."""
    settings = copy.copy(base)
    options = dict(params)
    if "targets" in options:
        options["targets"] = sets.get(options["targets"], options["targets"])
    if "alpha" in options:
        alpha = str(options["alpha"])
        factor = values.number("1" if alpha == "r" else alpha.removesuffix("r"))
        options["alpha"] = factor * options["r"] if alpha.endswith("r") else factor
    if options.get("init") == RSLORA:
        options |= {"init": "default", "rslora": True}
    if options.get("loraplus") == 1:
        options["loraplus"] = None
    vars(settings).update(options, seed=seed)
    return settings


def space_of(arguments: argparse.Namespace, sets: dict[str, str]) -> dict[str, Axis]:
    """Make the axes of the search from parsed arguments. sets: the target sets of the model, by name."""
    chosen = arguments.targets or [name for name in ("q,v", "attention", "all-linear") if name in sets]
    return {
        "r": Axis(tuple(arguments.r)),
        "alpha": Axis(tuple(arguments.alpha)),
        "dropout": Axis(tuple(arguments.dropout)),
        "targets": Axis(tuple(chosen)),
        "init": Axis(tuple(arguments.init)),
        "lr": _rates(arguments.lr),
        "loraplus": Axis(tuple(arguments.loraplus)),
    }


def first_of(space: dict[str, Axis]) -> Params:
    """Choose the first trial's parameters: train's default if the axis has it, else the first choice or the middle."""
    usual = dict(zip(_AXES, (16, "2r", 0.0, "all-linear", "default", 1e-3, 1.0), strict=True))
    middle = {name: math.sqrt(axis.low * axis.high) for name, axis in space.items() if not axis.choices}
    return {
        name: usual[name] if axis.holds(usual[name]) else axis.choices[0] if axis.choices else middle[name]
        for name, axis in space.items()
    }


def baselines_of(arguments: argparse.Namespace, task_type: str) -> dict[str, Sequence[float]]:
    """Return strategy -> learning rates with --baselines; the head alone only if the task has a new one."""
    if not arguments.baselines:
        return {}
    return {FULL: arguments.full_lr} | ({HEAD_ONLY: arguments.head_lr} if task_type in TASK_HEADS else {})


def table(records: Sequence[Record], monitor: str) -> str:
    """Format the trainings, one line each, with the parameters in which trials differ."""
    trials = [record.params for record in records if record.kind == LORA]
    names = [name for name in _AXES if name == "lr" or len({str(params[name]) for params in trials}) > 1]
    rows = [["", monitor, "trainable", "seconds", "seed", *names]]
    for record in records:
        outcome, params = record.outcome, record.params
        value = "diverged" if outcome.state == "diverged" else f"{outcome.value:.4f}"
        value += " given up" if outcome.state == "pruned" else ""
        cells = [show(params.get(name, "")) for name in names]
        rows.append([record.kind, value, f"{outcome.trainable:,}", f"{outcome.seconds:.1f}", str(record.seed), *cells])
    return aligned(rows, {0, 1})


def _order(sweep: Sweep) -> Any:
    places = {"complete": 0, "pruned": 1, "diverged": 2}
    return lambda r: (places[r.outcome.state], sweep.badness(r) if math.isfinite(r.outcome.value) else 0.0)


def _in(settings: argparse.Namespace, out: Path) -> argparse.Namespace:
    vars(settings)["out"] = out
    return settings


def _line(targets: str | list[str]) -> str:
    return targets if isinstance(targets, str) else ",".join(targets)


def _alpha(text: str) -> str:
    """Check a value of --alpha: a number, or a multiple of r such as "2r"."""
    try:
        values.number("1" if text == "r" else text.removesuffix("r"))
    except argparse.ArgumentTypeError:
        raise values.refused(text, "a finite number, or a multiple of r such as 2r") from None
    return text


def _rate(text: str) -> str:
    """Check a value of --lr: a learning rate, or LOW:HIGH."""
    ends = text.split(":")
    try:
        rates = [values.rate(end) for end in ends]
    except argparse.ArgumentTypeError:
        rates = []
    if len(rates) not in (1, 2) or rates != sorted(rates):
        raise values.refused(text, "a number above 0, or LOW:HIGH with 0 < LOW <= HIGH")
    return text


def _rates(words: Sequence[str]) -> Axis:
    if len(words) > 1 and any(":" in word for word in words):
        raise ConfigError(f"--lr {' '.join(words)}: give either a single LOW:HIGH, or learning rates")
    low, _, high = words[0].partition(":")
    return Axis(low=float(low), high=float(high)) if high else Axis(tuple(map(float, words)))
