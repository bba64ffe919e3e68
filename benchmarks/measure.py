"""One case, every contender: judged first, then timed in turns, then written as rows."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks import checks
from benchmarks.cases import DTYPE_NAMES, Case
from benchmarks.rivals import FROZEN, Implementation
from benchmarks.roofline import Ceilings, Work, passes
from benchmarks.rows import Check, Row
from benchmarks.timing import MIB, Call, Clock, captured, extra_peak_mib, interleaved, spread
from lora_kernels import plan as planner
from lora_kernels.cost import Problem as PlannerProblem
from lora_kernels.testing import Problem

GRAPH_BYTES = 256 * MIB  # a graph walks over copies of the operands of at least this size: no L2 holds them
GRAPH_COPIES = 48
Found = tuple[list[Row], list[Check]]


@dataclass(frozen=True)
class Bench:
    """What a measurement needs besides the case."""

    device: torch.device
    clock: Clock
    ceilings: Callable[[], Ceilings]  # measured when first asked for
    rounds: int = 25
    copies: int = GRAPH_COPIES


class DeviceBroken(RuntimeError):
    """An error after which no kernel of this process can run."""


@contextlib.contextmanager
def recorded(case: Case, name: Implementation | str, found: list[Check]) -> Iterator[None]:
    """An exception inside becomes a failed check in ``found``: what a contender throws must not take the others along.

    Raises:
        DeviceBroken: the GPU answers nothing any more.
    """
    try:
        yield
    except Exception as error:
        found.append(checks.failure(case, name, error))
        try:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except RuntimeError as broken:
            raise DeviceBroken(str(broken)) from error


def plan_label(implementation: Implementation, case: Case, mode: str, device: torch.device) -> str:
    """What ran: "shrink_extend", "auto (eager, shrink_extend)" for forward and backward, "reference", "" of a rival."""
    if not implementation.ours:
        return ""
    kind, forced = planner.split_name(implementation.backend)
    if kind == "reference":
        return "reference"
    ops = ("fwd", "bwd") if mode.startswith("fwd_bwd") else ("fwd",)
    used = [
        planner.choose(
            PlannerProblem(op, case.M, case.N, case.K, case.r, case.dtype, case.p > 0), planner.chip_for(device), forced
        ).name
        for op in ops
    ]
    name = forced or "auto"
    return name if set(used) == {name} else f"{name} ({', '.join(used)})"


def measure(case: Case, mode: str, implementations: Sequence[Implementation], bench: Bench) -> Found:
    """Rows of ``mode`` ("fwd", "fwd_bwd", or either with "_graph") for all that pass their checks, and the checks."""
    backward = mode.startswith("fwd_bwd")
    oracle = checks.Oracle(checks.problem_of(case, bench.device))
    found: list[Check] = []
    passed: list[Implementation] = []
    for implementation in implementations:
        why = implementation.missing()
        if why is not None:
            found.append(checks.not_run(case, implementation, why))
        elif implementation.dropout or case.p == 0:
            if implementation is FROZEN:  # it answers another question
                passed.append(implementation)
                continue
            with recorded(case, implementation, found):
                verdicts = list(checks.judge(case, oracle, implementation, backward))
                found += verdicts
                if all(verdict.status == "ok" for verdict in verdicts):
                    passed.append(implementation)
    problem = oracle.problem
    del oracle
    copies = _copies(problem, bench.copies) if mode.endswith("_graph") else [problem]
    calls: dict[Implementation, Call] = {}
    for implementation in passed:
        with recorded(case, implementation, found):
            calls[implementation] = _call(implementation, copies, mode)
    return _rows(case, mode, calls, len(copies), bench), found


def _copies(problem: Problem, most: int) -> list[Problem]:
    """The problem in as many copies as it takes to keep its operands out of the L2 cache."""
    tensors = {field: getattr(problem, field) for field in ("X", "W", "A", "B", "dY")}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    count = min(most, max(2, math.ceil(GRAPH_BYTES / size)))
    fresh = [{name: tensor.clone() for name, tensor in tensors.items()} for _ in range(count - 1)]
    return [problem, *(dataclasses.replace(problem, **copy) for copy in fresh)]


def _call(implementation: Implementation, problems: Sequence[Problem], mode: str) -> Call:
    """One step on the problem; for a graph, a replay of one step on each copy."""
    backward = mode.startswith("fwd_bwd")
    steps: list[Call] = []
    for problem in problems:
        layer = implementation.build(problem, None)
        X = problem.X.detach().requires_grad_(backward)
        steps.append(lambda layer=layer, X=X, dY=problem.dY: checks.step(layer, X, dY, backward))  # type: ignore[misc]
    call = captured(steps) if mode.endswith("_graph") else steps[0]
    call()
    return call


def _rows(case: Case, mode: str, calls: dict[Implementation, Call], copies: int, bench: Bench) -> list[Row]:
    keys = {f"{implementation.name} {implementation.backend}": implementation for implementation in calls}
    samples = interleaved({key: calls[keys[key]] for key in keys}, bench.clock, bench.rounds)
    spreads = {keys[key]: spread([ms / copies for ms in times]) for key, times in samples.items()}
    frozen = spreads[FROZEN].p50 if FROZEN in spreads else None
    best = min((spreads[i].p50 for i in spreads if i.is_rival(case.dtype)), default=None)
    rows = []
    for implementation, times in spreads.items():
        peak = None if copies > 1 else extra_peak_mib(calls[implementation], bench.device)
        plan = plan_label(implementation, case, mode, bench.device)
        work = passes(case, mode, lora=implementation is not FROZEN)
        name, ceilings = implementation.name, bench.ceilings()
        rows.append(row(case, mode, name, plan, times, work, ceilings, frozen, best, peak))
    return rows


def row(
    case: Case,
    mode: str,
    implementation: str,
    plan: str,
    times: tuple[float, float, float],
    work: Sequence[Work],
    ceilings: Ceilings,
    frozen: float | None,
    best_rival: float | None = None,
    peak_mib: float | None = None,
    op: str = "lora_linear",
) -> Row:
    """A row from the median, 20th and 80th percentile of its times in ms and the work of its passes."""
    p50 = times[0]
    bound = sum(ceilings.milliseconds(part, case.dtype) for part in work)
    return Row(
        op, mode, DTYPE_NAMES[case.dtype], "dense", case.M, case.N, case.K, case.r, 1, case.p, plan, implementation,
        *times,
        tflops=sum(part.flop for part in work) / p50 / 1e9,
        gbps=sum(part.bytes for part in work) / p50 / 1e6,
        pct_of_bound=100 * bound / p50,
        peak_mib=peak_mib,
        ratio_to_frozen=frozen and p50 / frozen,
        ratio_to_best_rival=best_rival and p50 / best_rival,
    )  # fmt: skip
