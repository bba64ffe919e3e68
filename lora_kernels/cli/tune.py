"""``lora-kernels tune``: measure the plans for a model's layers on this GPU and store the fastest."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lora_kernels.cli.shapes import DTYPES, MODEL_HELP, problems_of, shapes_from
from lora_kernels.cli.tables import aligned
from lora_kernels.errors import ConfigError
from lora_kernels.finetune import values
from lora_kernels.finetune.train.bar import tqdm_bar
from lora_kernels.finetune.train.extras import installed
from lora_kernels.planning.choose import chip_for, triton_missing
from lora_kernels.planning.cost import CallShape
from lora_kernels.planning.tuned import Entry
from lora_kernels.tuning.tune import REHEARSAL, Outcome, Progress, tune


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("tune", help="measure the plans for a model's layers on this GPU")
    add = parser.add_argument
    add("--shapes-from", type=values.model, required=True, metavar="MODEL", help=MODEL_HELP)
    add("--tokens", type=values.several(values.count), default=[512, 2048, 8192], help="rows (default: 512,2048,8192)")
    add("--r", type=values.rank, default=16, help="rank (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="bf16", help="of the weights (default: %(default)s)")
    add("--dropout", type=values.several(values.real(0.0, below=1.0)), default=[0.0, 0.1],
        help="probabilities (default: 0,0.1)")  # fmt: skip
    add("--ops", type=_directions, default=["fwd", "bwd"], help="fwd,bwd or one of them (default: both)")
    add("--budget", type=values.real(0.0, values.MAX_SECONDS), metavar="SECONDS",
        help="start no measurement after so many seconds; the same command continues")  # fmt: skip
    add("--out", type=values.replaced_file,
        help="the table (default: this GPU's in the user's cache, which the planner reads)")  # fmt: skip
    add("--again", action="store_true", help="also measure problems that are in the table")
    add(
        "--rehearse",
        action="store_true",
        help="run all steps in Triton's interpreter on tiny shapes; measures no speed",
    )
    add("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, write the table, print the choices. Return 0, also if the budget ended before the last problem."""
    if arguments.rehearse:
        return _rehearse(arguments)
    if not torch.cuda.is_available():
        raise ConfigError(
            "tune measures on a GPU, and torch finds none here; run it on the machine whose GPU is meant, or with "
            "--rehearse, which goes through all of it in an interpreter and measures nothing"
        )
    return _tune(arguments, torch.device("cuda", torch.cuda.current_device()))


def _rehearse(arguments: argparse.Namespace) -> int:
    """Tune tiny problems in the interpreter, in a new process: Triton reads TRITON_INTERPRET when it is imported."""
    device = torch.device("cpu")
    if triton_missing("cpu") is None:
        # Imported here, since no other command needs Triton.
        from lora_kernels.testing import interpreter

        interpreter.install()
        return _tune(arguments, device)
    if why := triton_missing("cuda"):
        raise ConfigError(f"--rehearse cannot run: {why}")
    options = {name: ",".join(map(str, getattr(arguments, name))) for name in ("tokens", "dropout", "ops")}
    options |= {name: getattr(arguments, name) for name in ("shapes_from", "r", "dtype", "budget", "out")}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
    words += [f"--{name}" for name in ("again", "quiet", "rehearse") if getattr(arguments, name)]
    command = [sys.executable, "-m", "lora_kernels.cli", "tune", *words]
    return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode


def _tune(arguments: argparse.Namespace, device: torch.device) -> int:
    shapes, dtype = shapes_from(arguments.shapes_from), DTYPES[arguments.dtype]
    dropouts = sorted({p > 0 for p in arguments.dropout})
    problems = problems_of(shapes, arguments.tokens, arguments.r, dtype, dropouts, arguments.ops, chip_for(device))
    if arguments.rehearse:
        problems = list(dict.fromkeys(tiny(q) for q in problems))
    with _bar(len(problems), shown=not arguments.quiet and installed("tqdm")) as on_progress:
        outcome = tune(
            problems,
            device,
            arguments.budget,
            arguments.out,
            on_progress,
            dropout_p=max(arguments.dropout) or 0.1,
            rounds=1 if arguments.rehearse else 20,
            again=arguments.again,
            rehearse=arguments.rehearse,
        )
    print(summary(outcome))
    return 0


def tiny(q: CallShape) -> CallShape:
    """Return a problem of the same kind that an interpreter runs in milliseconds."""
    return dataclasses.replace(q, M=33, N=88 if q.N > q.K else 80, K=64, r=min(q.r, 8))


def summary(outcome: Outcome) -> str:
    """Format each problem's choice beside eager, the failures, the problems left, and the path of the table."""
    rows: list[tuple[str, ...]] = [
        ("direction", "M", "N", "K", "r", "dropout", "plan", "us", "eager us", "ratio", "candidates")
    ]
    for e in outcome.entries:
        cells = (e.op, e.M, e.N, e.K, e.r, "yes" if e.dropout else "no", e.chosen.plan, *_times(e), len(e.measured))
        rows.append(tuple(map(str, cells)))
    lines = [aligned(rows)]
    reasons = Counter((label.split()[0], reason) for _, label, reason in outcome.faults)
    lines += [f"{plan}: {count} left out: {reason}" for (plan, reason), count in reasons.most_common()]
    if outcome.left:
        lines.append(f"{len(outcome.left)} problems were not reached; the same command goes on with them")
    if any(e.gpu == REHEARSAL for e in outcome.entries):
        lines.append("a rehearsal: these times mean nothing, and the planner does not read this table")
    return "\n".join([*lines, f"table: {outcome.path}"])


def _times(e: Entry) -> tuple[str, str, str]:
    return f"{e.chosen.cost:.1f}", f"{e.eager.cost:.1f}", f"{e.chosen.cost / e.eager.cost:.3f}"


@contextlib.contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[Progress], None]]:
    """Yield a function that shows progress in a tqdm bar over the problems, or does nothing."""
    if not shown:
        yield lambda progress: None
        return
    with tqdm_bar("tune", total, "problem") as bar:

        def show(progress: Progress) -> None:
            q = progress.problem
            where = "" if q is None else f"{q.op} M{q.M} N{q.N} K{q.K}: "
            bar.set_postfix_str(f"{where}{progress.text}"[:80], refresh=False)
            bar.update(progress.done - bar.n)

        yield show
        bar.update(total - bar.n)


def _directions(text: str) -> list[str]:
    ops = text.split(",")
    if not set(ops) <= {"fwd", "bwd"}:
        raise argparse.ArgumentTypeError(f"{text!r}; accepted are fwd, bwd and fwd,bwd")
    return list(dict.fromkeys(ops))
