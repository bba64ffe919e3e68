"""Units of a GPU round that are no layer beside its rivals: the host's overhead, tuning, whole training runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.accelerate import Setting, measure_steps
from benchmarks.cases import DTYPE_NAMES, FEW_ROWS, TARGET_CASES, Case, distinct, tiny
from benchmarks.end_to_end import train
from benchmarks.measure import Bench, Found
from benchmarks.models import SIZES
from benchmarks.overhead import CONTENDERS, overhead
from benchmarks.rows import Check
from lora_kernels.planning.cost import CallShape
from lora_kernels.planning.tuned import Entry
from lora_kernels.tuning.tune import tune

Unit = Callable[[Bench], Found]
TUNE_SECONDS = 200.0  # of one problem: compiling its candidates takes most of it


def overhead_rows(rehearse: bool, bench: Bench) -> Found:
    """What the host spends on a call, in bf16 on a GPU; a rehearsal makes its times up, and does without PEFT."""
    dtype = torch.float32 if bench.device.type == "cpu" else torch.bfloat16
    few = [each for each in CONTENDERS if not (rehearse and each.needs)]
    rows = overhead(bench.device, dtype, (0.0,) if rehearse else (0.0, 0.1), bench.rounds, few)
    made_up = {"ms_p50": 1.0, "ms_p20": 1.0, "ms_p80": 1.0, "ratio_to_frozen": 1.0}
    return [replace(row, **made_up) for row in rows] if rehearse else rows, []


def tune_units(out: Path, rehearse: bool) -> Iterator[tuple[str, Unit]]:
    """A unit a problem of the target table and of few rows, forward and backward; all write OUT/tuned.json."""
    cases: list[Case] = [*TARGET_CASES[:2], *FEW_ROWS[3:], *TARGET_CASES[2:]]
    if rehearse:
        cases = distinct(tiny(case) for case in cases[:1])
    for case in cases:
        for op in ("fwd", "bwd"):
            q = CallShape(op, case.M, case.N, case.K, case.r, case.dtype, dropout=case.p > 0)
            yield f"{op} {case}", partial(_tuned, case, q, out / "tuned.json", rehearse)


def _tuned(case: Case, q: CallShape, table: Path, rehearse: bool, bench: Bench) -> Found:
    rounds = 1 if rehearse else bench.rounds
    outcome = tune([q], bench.device, TUNE_SECONDS, table, rounds=rounds, rehearse=rehearse)
    faults = [_check(case, f"{q.op} {label}", "refused", reason) for _, label, reason in outcome.faults]
    if not outcome.entries:
        return [], [*faults, _check(case, q.op, "not run", f"not all candidates had their turn in {TUNE_SECONDS:g} s")]
    (entry,) = outcome.entries
    return [], [*faults, _check(case, f"{q.op} {entry.chosen.plan}", "ok", _story(entry))]


def _story(entry: Entry) -> str:
    times = sorted((each.us, each.plan) for each in entry.measured)
    return f"chosen {entry.chosen.plan} {entry.chosen.us:.1f} us; " + ", ".join(f"{n} {us:.1f}" for us, n in times[:5])


def _check(case: Case, what: str, status: str, message: str) -> Check:
    return Check(
        "tune", DTYPE_NAMES[case.dtype], case.M, case.N_shown, case.K, case.r, case.p, "lora_kernels", what, status,
        message=message[:300],
    )  # fmt: skip


def training_units(rehearse: bool) -> Iterator[tuple[str, Unit]]:
    """Curves of small models in fp32, where the rule for curves is sharp; then speed and memory in bf16."""
    for model in SIZES:
        size = "rehearsal" if rehearse else "cpu"
        yield f"curves {model}", partial(_trained, model, size, torch.float32, 3 if rehearse else 40, rehearse)
    for model in ("bert",) if rehearse else tuple(SIZES):
        size = "rehearsal" if rehearse else "gpu"
        yield f"speed {model}", partial(_trained, model, size, torch.bfloat16, 3 if rehearse else 20, rehearse)


def step_units(rehearse: bool) -> Iterator[tuple[str, Unit]]:
    """Whole steps of PEFT's models beside the accelerated ones: LoRA everywhere, then on the attention alone."""
    kinds = [("bert", "all-linear"), ("llama", "all-linear"), ("bert", "attention"), ("llama", "attention")]
    for model, targets in kinds[:1] if rehearse else kinds:
        for dropout in (0.0, 0.1):
            size, dtype = ("rehearsal", torch.float32) if rehearse else ("gpu", torch.bfloat16)
            setting = Setting(model, SIZES[model][size], targets, dropout, dtype)
            yield str(setting.case), partial(_stepped, setting, rehearse)


def _stepped(setting: Setting, rehearse: bool, bench: Bench) -> Found:
    return measure_steps(setting, bench.device, bench.clock, bench.rounds, rehearse)


def _trained(model: str, size: str, dtype: torch.dtype, steps: int, rehearse: bool, bench: Bench) -> Found:
    fast = dtype is torch.bfloat16  # compiling takes long; where only curves count it is left out
    made = train(
        model, SIZES[model][size], bench.device, dtype, steps, backend="triton", compiled=fast,
        clock=1.0 if rehearse else None,
    )  # fmt: skip
    bench.curves.extend(made.curves)
    return made.rows if fast else [], made.checks
