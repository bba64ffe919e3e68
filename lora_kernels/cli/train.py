"""``lora-kernels train``: fine-tune a model on a task. A run that was killed can be resumed."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lora_kernels.atomic_write import atomic_write
from lora_kernels.config import LoRAConfig
from lora_kernels.errors import ConfigError
from lora_kernels.finetune import values
from lora_kernels.finetune.advise.recipe import Recipe, run
from lora_kernels.finetune.tasks import TASKS, Task
from lora_kernels.finetune.train import processes
from lora_kernels.finetune.train.checkpoint import checkpoints
from lora_kernels.finetune.train.options import TrainOptions
from lora_kernels.finetune.train.schedule import SCHEDULES

INITS: dict[str, bool | str] = {"default": True, "random": False, **{x: x for x in ("gaussian", "pissa", "olora")}}


def chosen_task(arguments: Sequence[str]) -> type[Task]:
    """Find --task in a command line, so that the task's options can be declared. Default: the first task."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--task", default=next(iter(TASKS)))
    name = finder.parse_known_args(list(arguments))[0].task
    return TASKS.get(name, next(iter(TASKS.values())))  # the real parser refuses an unknown name


def add_parser(subparsers: Any, task: type[Task]) -> None:
    """Declare the command with the options of ``task``."""
    parser = subparsers.add_parser("train", help="fine-tune on a task, with everything adjustable", allow_abbrev=False)
    add_arguments(parser, task)
    parser.set_defaults(run=run_command)


def add_arguments(parser: argparse.ArgumentParser, task: type[Task]) -> None:
    """Declare the options of the run, of LoRA, of training, and of the task."""
    add = parser.add_argument
    add("--task", choices=sorted(TASKS), default=task.name)
    add("--out", type=values.output_folder, help="folder for the results (default: out/TASK)")
    checkpoints_in_out = parser.add_mutually_exclusive_group().add_argument
    checkpoints_in_out("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    checkpoints_in_out("--overwrite", action="store_true", help="delete the checkpoints of an earlier run in --out")
    add("--device", type=values.device, default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    add(
        "--timeout", type=values.seconds, default=600, help="seconds to wait for another process (default: %(default)s)"
    )
    add("--threads", type=values.threads, default=0, help="CPU threads (default: torch's choice)")
    add("--backend", type=values.backend, default="auto", help="auto, reference, triton or triton:PLAN (default: auto)")
    add("--beside-peft", action="store_true", help="also time the same steps in PEFT")
    add("--quiet", action="store_true", help="no progress bar")

    lora = parser.add_argument_group("LoRA").add_argument
    lora("--r", type=values.rank, default=16, help="rank (default: %(default)s)")
    lora("--alpha", type=values.number, default=32, help="numerator of the scaling (default: %(default)s)")
    lora("--dropout", type=values.probability, default=0.0, help="on the adapter's input (default: %(default)s)")
    lora("--targets", default="all-linear", help="all-linear, a regular expression, or names separated by commas")
    lora("--exclude", help="names separated by commas, or a regular expression")
    lora("--rslora", action="store_true", help="scaling alpha / sqrt(r) instead of alpha / r")
    lora("--init", choices=sorted(INITS), default="default", help="init of A and B (default: as in PEFT)")

    training = parser.add_argument_group("training").add_argument
    training("--epochs", type=values.count, default=1)
    training("--batch-size", type=values.count, default=32, help="of each process (default: %(default)s)")
    training("--accumulate", type=values.count, default=1, help="batches per optimizer step (default: %(default)s)")
    training("--lr", type=values.rate, default=1e-3, help="learning rate (default: %(default)s)")
    training(
        "--loraplus", type=values.real(0.0), metavar="RATIO", help="learning rate of B over that of A (default: 1)"
    )
    training("--weight-decay", type=values.real(0.0), default=0.01, help="default: %(default)s")
    training("--schedule", choices=SCHEDULES, default="cosine", help="default: %(default)s")
    training("--warmup", type=values.real(0.0, values.MAX_COUNT), default=0.1,
             help="steps; below 1, a share of all steps (default: %(default)s)")  # fmt: skip
    training("--clip-norm", type=values.real(0.0), default=1.0,
             help="largest norm of the gradients, 0 for no clipping (default: %(default)s)")  # fmt: skip
    training("--bf16", action="store_true", help="autocast to bfloat16")
    training("--seed", type=values.seed, default=0)
    training("--patience", type=values.count, help="stop after so many epochs without improvement and keep the best")
    training("--monitor", type=values.one_of(task.monitors), default=task.monitor,
             help=f"metric that must improve, {' or '.join(task.monitors)} (default: %(default)s)")  # fmt: skip
    training("--checkpoint-every", type=values.whole(), default=50,
             help="steps between checkpoints (default: %(default)s)")  # fmt: skip
    training("--no-checkpoints", action="store_true", help="write no checkpoints")

    task.add_arguments(parser.add_argument_group(f"task {task.name}"))


def run_command(arguments: argparse.Namespace) -> int:
    """Train with ``arguments`` and write the command that reproduces the run to --out.

    Under torchrun all processes train together and the first one writes. If one fails, all end.
    """
    with processes.joined(find_device(arguments.device), arguments.timeout):
        return _train(arguments)


def _train(arguments: argparse.Namespace) -> int:
    out = arguments.out or Path("out") / arguments.task
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    task = TASKS[arguments.task].from_arguments(arguments)
    folder = None if arguments.no_checkpoints else out / "checkpoints"
    if arguments.resume and folder is None:
        raise ConfigError("--resume needs checkpoints; leave out --no-checkpoints")
    recipe = recipe_of(arguments, TASKS[arguments.task], folder)
    first = processes.rank() == 0
    if arguments.overwrite and folder is not None and first:
        for path in checkpoints(folder):
            path.unlink()
    if arguments.resume and folder is not None and first:
        found = checkpoints(folder)
        print(f"resuming from {found[0]}" if found else f"no checkpoint in {folder}: starting from the beginning")
    run(task, recipe, out, resume=arguments.resume)
    if first:
        command = reproduce(arguments)
        atomic_write(out / "reproduce.sh", f"{command}\n".encode())
        print(f"results: {out}/adapter, {out}/metrics.json, {out}/training.png\nto reproduce: {command}")
    return 0


def recipe_of(arguments: argparse.Namespace, task: type[Task], checkpoint_dir: Path | None) -> Recipe:
    """Make the Recipe from parsed arguments. Raises ConfigError for invalid combinations."""
    lora = LoRAConfig(
        r=arguments.r,
        lora_alpha=arguments.alpha,
        lora_dropout=arguments.dropout,
        target_modules=names_or_pattern(arguments.targets),
        exclude_modules=names_or_pattern(arguments.exclude),
        use_rslora=arguments.rslora,
        init_lora_weights=INITS[arguments.init],
        task_type=task.task_type,
    )
    options = TrainOptions(
        accumulate=arguments.accumulate,
        clip_norm=arguments.clip_norm or None,
        bf16=arguments.bf16,
        schedule=arguments.schedule,
        warmup=arguments.warmup,
        patience=arguments.patience,
        monitor=arguments.monitor,
        checkpoint_dir=checkpoint_dir,
        checkpoint_every=arguments.checkpoint_every,
        progress=not arguments.quiet,
    )
    return Recipe(
        lora=lora,
        options=options,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        weight_decay=arguments.weight_decay,
        loraplus=arguments.loraplus,
        seed=arguments.seed,
        device=find_device(arguments.device),
        backend=arguments.backend,
        beside_peft=arguments.beside_peft,
    )


def find_device(name: str) -> str:
    """Return the device's name; for "auto", a GPU if there is one. Raises ConfigError if it cannot be used."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if reason := values.unusable(name):
        raise ConfigError(f"device {name!r} cannot be used: {reason}")
    return name


def names_or_pattern(text: str | None) -> str | list[str] | None:
    """Convert --targets to LoRAConfig's target_modules: "q,v" and "query" are names.

    "all-linear" and texts with characters of regular expressions are not split.
    """
    if text is None or text == "all-linear" or not all(c.isalnum() or c in "_.,-" for c in text):
        return text
    return [name for name in text.split(",") if name]


def reproduce(arguments: argparse.Namespace) -> str:
    """Return the command line with all options, including defaults and the values chosen by "auto"."""
    words = ["lora-kernels", "train"]
    if processes.count() > 1:  # without --, torchrun reads --r and --monitor as abbreviations of its own options
        words = ["torchrun", "--nproc-per-node", str(processes.count()), "-m", "--", "lora_kernels.cli", "train"]
    found = {"device": find_device(arguments.device), "threads": torch.get_num_threads()}
    for name, value in sorted({**vars(arguments), **found}.items()):
        if name in ("command", "run", "resume", "overwrite") or value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return shlex.join(words)
