"""One case, every contender: judged first, then timed in turns, then written as rows."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import checks
from benchmarks.blocks import Block
from benchmarks.cases import DTYPE_NAMES, Case
from benchmarks.counting import operators, saved_mib
from benchmarks.rivals import FROZEN, Implementation
from benchmarks.roofline import Ceilings, Work, passes
from benchmarks.rows import Check, Record, Row
from benchmarks.timing import MIB, Call, Clock, extra_peak_mib, interleaved
from lora_kernels import BackendUnavailableError
from lora_kernels.planning import choose as planner
from lora_kernels.planning.cost import CallShape
from lora_kernels.testing import Problem
from lora_kernels.tuning.measure import captured, spread

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
    warmup: int = 2
    copies: int = GRAPH_COPIES
    curves: list[Record] = field(default_factory=list)  # what a unit leaves beside its rows and checks


class DeviceBroken(RuntimeError):
    """An error after which no kernel of this process can run."""


@contextlib.contextmanager
def recorded(case: Case, name: Implementation | str, found: list[Check], check: str = "rule") -> Iterator[None]:
    """An exception inside becomes a failed check in ``found``: what a contender throws must not take the others along.

    A plan that says it cannot run is "refused" instead.

    Raises:
        DeviceBroken: the GPU answers nothing any more.
    """
    try:
        yield
    except BackendUnavailableError as refusal:
        found.append(replace(checks.not_run(case, name, str(refusal), check), status="refused"))
    except Exception as error:
        found.append(checks.failure(case, name, error, check))
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
    if case.op != "lora_linear":
        return forced or "auto"
    ops = ("fwd", "bwd") if mode.startswith("fwd_bwd") else ("fwd",)
    used = [
        planner.choose(
            CallShape(op, case.M, case.N, case.K, case.r, case.dtype, case.p > 0), planner.chip_for(device), forced
        ).name
        for op in ops
    ]
    name = forced or "auto"
    return name if set(used) == {name} else f"{name} ({', '.join(used)})"


def measure(case: Case, mode: str, implementations: Sequence[Implementation], bench: Bench) -> Found:
    """Rows of ``mode`` ("fwd", "fwd_bwd", or either with "_graph") for all that pass their checks, and the checks."""
    backward = mode.startswith("fwd_bwd")
    oracle = _oracle(case, bench.device)
    found: list[Check] = []
    passed: list[Implementation] = []
    for implementation in implementations:
        why = implementation.missing()
        if why is not None:
            found.append(checks.not_run(case, implementation, why))
        elif implementation.dropout or case.p == 0:
            if not implementation.lora:  # it answers another question
                passed.append(implementation)
                continue
            with recorded(case, implementation, found):
                verdicts = list(checks.judge(case, oracle, implementation, backward))
                found += verdicts
                if all(verdict.status == "ok" for verdict in verdicts):
                    passed.append(implementation)
    problem = oracle.problem
    copies = _copies(problem, bench.copies) if mode.endswith("_graph") else [problem]
    set_up: dict[Implementation, Ready] = {}
    for implementation in passed:
        with recorded(case, implementation, found):
            set_up[implementation] = ready(implementation, copies, mode)
    return _rows(case, mode, set_up, len(copies), bench), found


@functools.lru_cache(maxsize=1)
def _oracle(case: Case, device: torch.device) -> checks.Oracle:
    """Of a case that is measured in one unit after another; a case's tensors take seconds to draw."""
    return checks.Oracle(checks.problem_of(case, device))


def _copies(problem: Problem | Block, most: int) -> list[Problem | Block]:
    """The problem in as many copies as it takes to keep its operands out of the L2 cache."""
    parts = problem.parts if isinstance(problem, Block) else (problem,)
    tensors = {id(t): t for part in parts for t in (part.X, part.W, part.A, part.B, part.dY)}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    count = min(most, max(2, math.ceil(GRAPH_BYTES / size)))
    return [problem, *(copy.deepcopy(problem) for _ in range(count - 1))]


class Ready(NamedTuple):
    """A contender set up to be timed; ``kept``: MiB saved for backward and operators dispatched, None of a graph or
    of a compiled rival."""

    call: Call
    kept: tuple[float, int] | None


def ready(implementation: Implementation, problems: Sequence[Problem | Block], mode: str) -> Ready:
    """One step on the problem; for a graph, a replay of one step on each copy."""
    backward = mode.startswith("fwd_bwd")
    steps: list[Call] = []
    weights: list[Tensor] = []
    for problem in problems:
        layer = implementation.build(problem, None)
        X = problem.X.detach().requires_grad_(backward)
        steps.append(lambda layer=layer, X=X, dY=problem.dY: checks.step(layer, X, dY, backward))  # type: ignore[misc]
        parts = problem.parts if isinstance(problem, Block) else (problem,)
        weights += [*layer.params, *(part.W for part in parts), *(part.bias for part in parts if part.bias is not None)]
    if mode.endswith("_graph"):
        call = captured(steps, problems[0].X.device)
        call()
        return Ready(call, None)
    steps[0]()
    if implementation.compiled:
        return Ready(steps[0], None)
    return Ready(steps[0], (saved_mib(steps[0], weights), operators(steps[0])))


def _rows(case: Case, mode: str, ready: dict[Implementation, Ready], copies: int, bench: Bench) -> list[Row]:
    keys = {f"{implementation.name} {implementation.backend}": implementation for implementation in ready}
    samples = interleaved({key: ready[keys[key]].call for key in keys}, bench.clock, bench.rounds, bench.warmup)
    spreads = {keys[key]: spread([ms / copies for ms in times]) for key, times in samples.items()}
    frozen = next((times.p50 for i, times in spreads.items() if i.name == FROZEN.name), None)
    best = min((spreads[i].p50 for i in spreads if i.is_rival(case.dtype)), default=None)
    rows = []
    for implementation, times in spreads.items():
        call, kept = ready[implementation]
        peak = None if copies > 1 else extra_peak_mib(call, bench.device)
        plan = plan_label(implementation, case, mode, bench.device)
        work = passes(case, mode, lora=implementation.lora)
        made = row(case, mode, implementation.name, plan, times, work, bench.ceilings(), frozen, best, peak)
        rows.append(made if kept is None else replace(made, saved_mib=kept[0], operators=kept[1]))
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
    op: str | None = None,
) -> Row:
    """A row from the median, 20th and 80th percentile of its times in ms and the work of its passes."""
    p50 = times[0]
    bound = sum(ceilings.milliseconds(part, case.dtype) for part in work)
    return Row(
        op or case.op, mode, DTYPE_NAMES[case.dtype], "dense", case.M, case.N_shown, case.K, case.r, 1, case.p, plan,
        implementation, *times,
        tflops=sum(part.flop for part in work) / p50 / 1e9,
        gbps=sum(part.bytes for part in work) / p50 / 1e6,
        pct_of_bound=100 * bound / p50,
        peak_mib=peak_mib,
        ratio_to_frozen=frozen and p50 / frozen,
        ratio_to_best_rival=best_rival and p50 / best_rival,
    )  # fmt: skip
