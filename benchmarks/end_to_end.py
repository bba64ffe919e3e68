"""Whole training runs: ``python -m benchmarks.end_to_end [--model llama|bert] [--device cuda] [--steps 60]``.

The same model (random weights), data, adapters, optimizer and seeds, trained by PEFT, by torch.compile(PEFT) and by
us, steps taken in turns so that a drifting clock falls on all alike. OUT gets rows.csv (milliseconds a step, peak
memory), curves.csv (loss by step) and checks.csv: whether the curves agree, by the rule of curves.py.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.cases import DTYPE_NAMES, DTYPES, Case
from benchmarks.curves import PEFT, REVERSED, ROTATED, TWINS, curve_columns, judged, verdict
from benchmarks.models import SIZES, Batch, Size, batches, build, rows_reversed, rows_rotated
from benchmarks.rows import Check, Machine, Record, Row, columns, record, this_machine, write_csv
from benchmarks.timing import MIB
from lora_kernels import load_adapter, use_backend
from lora_kernels.finetune import values
from lora_kernels.tuning.measure import spread

RANK, ALPHA, RATE = 8, 16, 1e-3
ORDERS = {REVERSED: rows_reversed, ROTATED: rows_rotated}
COMPILED, OURS = "peft torch.compile", "lora_kernels"


@dataclass
class Run:
    """One contender: what it trained, how long each step took (ms), the losses, and MiB it held at its peak."""

    name: str
    model: Any
    optimizer: torch.optim.Optimizer
    reordered: Callable[[Batch], Batch] | None = None
    backend: str = "auto"
    times: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    held: int = 0  # bytes that stay from step to step
    peak: int = 0

    def step(self, batch: Batch, device: torch.device) -> None:
        """One optimizer step; the loss is read after the clock has stopped."""
        batch = self.reordered(batch) if self.reordered else batch
        cuda = device.type == "cuda"
        before = 0
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        with use_backend(self.backend):
            loss = self.model(**batch).loss
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        self.times.append(1e3 * (time.perf_counter() - started))
        self.losses.append(float(loss.detach()))
        if cuda:
            self.peak = max(self.peak, self.held + torch.cuda.max_memory_allocated() - before)
            self.held += torch.cuda.memory_allocated() - before


def _optimizer(trained: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=RATE)


def contenders(model: str, size: Size, device: torch.device, dtype: torch.dtype, backend: str) -> Iterator[Run]:
    """PEFT, its twins on reordered rows, torch.compile(PEFT), ours: each on a base of its own with the same values.

    The adapters that PEFT drew are saved and loaded into ours.
    """
    from peft import LoraConfig, get_peft_model

    def held() -> int:
        return torch.cuda.memory_allocated() if device.type == "cuda" else 0

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear")
    with tempfile.TemporaryDirectory() as folder:
        for name in (PEFT, *TWINS, COMPILED):
            before = held()
            base: Any = build(model, size, device, dtype)
            torch.manual_seed(7)
            wrapped: Any = get_peft_model(base, config)
            if name == PEFT:
                wrapped.save_pretrained(folder)
            trained = _compiled(wrapped, device) if name == COMPILED else wrapped
            yield Run(name, trained, _optimizer(wrapped), ORDERS.get(name), held=held() - before)
        before = held()
        mine = load_adapter(build(model, size, device, dtype), folder, trainable=True)
        yield Run(OURS, mine, _optimizer(mine), backend=backend, held=held() - before)


def _compiled(model: nn.Module, device: torch.device) -> Any:
    torch.compiler.reset()
    return torch.compile(model, backend="inductor" if device.type == "cuda" else "eager", dynamic=False)


@dataclass(frozen=True)
class Outcome:
    """Rows, checks and curve points of one model."""

    rows: list[Row]
    checks: list[Check]
    curves: list[Record]


def train(
    model: str,
    size: Size,
    device: torch.device,
    dtype: torch.dtype,
    steps: int,
    backend: str = "auto",
    compiled: bool = True,
    clock: float | None = None,
) -> Outcome:
    """All contenders for ``steps`` steps, in turns; the first three steps are not timed.

    Args:
        clock: milliseconds that a rehearsal writes for every step instead of the measured ones.
    """
    runs = [run for run in contenders(model, size, device, dtype, backend) if compiled or run.name != COMPILED]
    for number, batch in enumerate(batches(model, size, steps, device)):
        first = number % len(runs)
        for run in runs[first:] + runs[:first]:
            run.step(batch, device)
    curves = list(judged(model, {run.name: run.losses for run in runs}, dtype))
    case = Case(size.batch_tokens, size.inner, size.width, RANK, dtype=dtype, op=f"train_{model}")
    times = {run.name: spread([clock] if clock else run.times[min(3, steps - 1) :]) for run in runs}
    rivals = [times[name].p50 for name in (PEFT, COMPILED) if name in times]
    rows = [
        Row(
            case.op, "train", DTYPE_NAMES[dtype], "dense", case.M, case.N, case.K, case.r, 1, 0.0,
            "auto" if run.name == OURS else "", run.name, *times[run.name], None, None, None,
            run.peak / MIB if device.type == "cuda" else None, None, times[run.name].p50 / min(rivals),
        )
        for run in runs
        if run.name not in TWINS
    ]  # fmt: skip
    return Outcome(rows, [verdict(case, name, curves) for name in times if name not in (PEFT, *TWINS)], curves)


def report(outcome: Outcome, steps: int) -> Iterator[str]:
    """A line a contender: tokens a second, time of a step beside PEFT's, memory, first and last loss."""
    peft = next(row for row in outcome.rows if row.implementation == PEFT)
    for row in outcome.rows:
        curve = [point for point in outcome.curves if point["implementation"] == row.implementation]
        last = statistics.fmean(point["loss"] for point in curve[-10:])
        memory = "" if row.peak_mib is None else f", peak {row.peak_mib:,.0f} MiB"
        yield (
            f"{row.op} {row.implementation}: {row.M / row.ms_p50 * 1e3:,.0f} tokens/s, {row.ms_p50:.2f} ms a step "
            f"({row.ms_p20:.2f} to {row.ms_p80:.2f}), {row.ms_p50 / peft.ms_p50:.3f} of PEFT's{memory}; "
            f"loss {curve[0]['loss']:.4f} -> {last:.4f} after {steps} steps"
        )
    for check in outcome.checks:
        used = f"{check.max_ratio:.2f} of what is allowed" if check.max_ratio is not None else ""
        yield f"{check.what} {check.implementation}: curve {check.status}, {used} {check.message}".rstrip()


def write(out: Path, outcomes: Sequence[Outcome], machine: Machine) -> None:
    """rows.csv, curves.csv and checks.csv in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [record(row, machine) for outcome in outcomes for row in outcome.rows]
    checks = [record(check, machine) for outcome in outcomes for check in outcome.checks]
    write_csv(out / "rows.csv", columns(Row), rows)
    write_csv(out / "checks.csv", columns(Check), checks)
    points = [point | asdict(machine) for outcome in outcomes for point in outcome.curves]
    write_csv(out / "curves.csv", curve_columns(), points)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=[*SIZES, "all"], default="all")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--size", choices=["rehearsal", "cpu", "gpu"], help="default: by device")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--steps", type=values.count, default=60)
    parser.add_argument("--threads", type=values.threads, help="PyTorch's threads on a CPU (default: its own choice)")
    parser.add_argument("--backend", type=values.backend, default="auto", help="ours (default auto)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile(PEFT) out")
    parser.add_argument("--out", type=values.output_folder, default=Path("out/end_to_end"))
    options = parser.parse_args(argv)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.steps < 1 or (options.device == "cuda" and not torch.cuda.is_available()):
        parser.error("--steps is at least 1, and --device cuda needs a CUDA device")
    if options.threads:
        torch.set_num_threads(options.threads)
    device, machine = torch.device(options.device), this_machine()
    dtype = DTYPES[options.dtype or ("fp32" if device.type == "cpu" else "bf16")]
    print(f"{machine.gpu}, torch {machine.torch}, triton {machine.triton}, commit {machine.commit}")
    if device.type == "cpu":
        print(f"Load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs; torch.compile without code generation")
    outcomes = []
    for model in SIZES if options.model == "all" else [options.model]:
        size = SIZES[model][options.size or ("cpu" if device.type == "cpu" else "gpu")]
        outcome = train(model, size, device, dtype, options.steps, options.backend, not options.no_compile)
        outcomes.append(outcome)
        print("\n".join(report(outcome, options.steps)), flush=True)
        write(options.out, outcomes, machine)
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
    print(f"rows, curves and checks in {options.out}")
    return 1 if any(check.status != "ok" for outcome in outcomes for check in outcome.checks) else 0


if __name__ == "__main__":
    sys.exit(main())
