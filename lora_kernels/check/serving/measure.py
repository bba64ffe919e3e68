"""Judges all contenders of a case, then times them in turns (on a GPU with a cold L2): median and percentiles."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.check.serving.cases import ServingCase
from lora_kernels.check.serving.rivals import FROZEN, Contender, plan_label
from lora_kernels.errors import BackendUnavailableError
from lora_kernels.testing import poison, within_rule
from lora_kernels.testing.multi import MultiProblem
from lora_kernels.tuning.measure import SWEEP_BYTES, SWEEP_HOST_US, Spread, _cuda_round, _host_round, captured, spread

JUDGED_ROWS = 1024  # at most, spread over the batch: rows are independent
RIVAL_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
GRAPH_BYTES = 256 << 20  # a graph uses copies of the operands of at least this total size, more than any L2
GRAPH_COPIES = 48
Timer = Callable[[Mapping[str, Callable[[], object]], int], dict[str, list[float]]]


class Judgement(NamedTuple):
    """Verdict on a contender's Y: "ok", "failed", "refused" (the plan does not take the case) or "not run"."""

    contender: Contender
    status: str
    message: str = ""
    max_ratio: float | None = None
    rms_ratio: float | None = None


@dataclass(frozen=True)
class Timing:
    """Time of one contender on one case: median, 20th and 80th percentile in ms, and ratios.

    plan: what ran, for ours. ratio_to_best_rival: to the fastest that is neither ours nor frozen; None without one.
    """

    case: ServingCase
    contender: Contender
    plan: str
    ms_p50: float
    ms_p20: float
    ms_p80: float
    ratio_to_frozen: float | None = None
    ratio_to_best_rival: float | None = None

    @property
    def tokens_per_s(self) -> float:
        """Rows per second of consecutive calls."""
        return 1e3 * self.case.M / self.ms_p50


class Trial(NamedTuple):
    """Timings and judgements of a case."""

    timings: list[Timing]
    judgements: list[Judgement]


class Oracle:
    """Hold a case's operands, and Y of some of its rows in float64 and by plain PyTorch, computed row by row."""

    def __init__(self, case: ServingCase, device: torch.device) -> None:
        self.problem = case.problem(device)
        self.rows = torch.linspace(0, case.M - 1, min(case.M, JUDGED_ROWS), device=device).long()
        self.exact, self.usual = (self._answer(dtype) for dtype in (torch.float64, case.dtype))

    def _answer(self, dtype: torch.dtype) -> Tensor:
        q = self.problem
        X, A, B = q.X[self.rows].to(dtype), q.slots.A, q.slots.B
        Y = F.linear(X, q.W.to(dtype), None if q.bias is None else q.bias.to(dtype))
        starts, ranks, scalings = (values.tolist() for values in (q.slots.starts, q.slots.ranks, q.slots.scalings))
        for i, slot in enumerate(q.ids[self.rows].tolist()):
            if slot >= 0 and ranks[slot]:
                own = slice(starts[slot], starts[slot] + ranks[slot])
                Y[i] += scalings[slot] * (B[:, own].to(dtype) @ (A[own].to(dtype) @ X[i]))
        return Y

    def judge(self, contender: Contender, Y: Tensor, dtype: torch.dtype) -> Judgement:
        """Judge ours by the error rule, and a rival, whose rounding differs, by RIVAL_TOLERANCE."""
        if not Y.isfinite().all():
            return Judgement(contender, "failed", f"{int((~Y.isfinite()).sum())} elements are not finite")
        got = Y[self.rows]
        if contender.ours:
            verdict = within_rule(got, self.usual, self.exact, what="Y", dtype=dtype)
            status, message = ("ok", "") if verdict.ok else ("failed", verdict.message)
            return Judgement(contender, status, message, verdict.max_ratio, verdict.rms_ratio)
        error = float((got.double() - self.exact).norm() / self.exact.norm())
        fine = error <= RIVAL_TOLERANCE[dtype]
        return Judgement(contender, "ok" if fine else "failed", "" if fine else f"relative error {error:.1e}")


@functools.lru_cache(maxsize=1)
def oracle_of(case: ServingCase, device: torch.device) -> Oracle:
    """Of the last case: it is measured in one mode after another, and its operands take seconds to draw."""
    return Oracle(case, device)


def judged(case: ServingCase, contenders: Sequence[Contender], device: torch.device) -> Iterator[Judgement]:
    """Each contender on the case; ours on memory filled with NaN. The frozen layer answers another question."""
    for contender in contenders:
        if contender is FROZEN:
            continue
        if why := contender.missing():
            yield Judgement(contender, "not run", why)
            continue
        oracle = oracle_of(case, device)
        try:
            with torch.no_grad():
                call = contender.build(case, oracle.problem)
                if contender.ours:
                    with poison():
                        Y = call()
                else:
                    Y = call()
            yield oracle.judge(contender, Y, case.dtype)
        except BackendUnavailableError as refusal:
            yield Judgement(contender, "refused", str(refusal))
        except Exception as error:  # an error in one contender must not stop the others
            yield _thrown(contender, error)


def _thrown(contender: Contender, error: Exception) -> Judgement:
    return Judgement(contender, "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def measure(
    case: ServingCase,
    contenders: Sequence[Contender],
    device: torch.device,
    *,
    graph: bool = False,
    rounds: int = 25,
    timer: Timer | None = None,
    copies: int = GRAPH_COPIES,
) -> Trial:
    """Return judgements of all contenders, and timings of those that are correct.

    graph: time replays of a CUDA graph that makes one call on each copy of the operands; the copies exceed every cache.
    Contenders that a graph cannot capture are skipped. On a CPU the calls on the copies run one after another.
    """
    found = list(judged(case, contenders, device))
    right = {each.contender for each in found if each.status == "ok"} | {FROZEN}
    timed = [each for each in contenders if each in right and (each.graph or not graph)]
    problem = oracle_of(case, device).problem
    problems = _copies(problem, copies) if graph else [problem]
    with torch.no_grad():
        calls: dict[str, Callable[[], object]] = {}
        for each in timed:
            try:
                steps = [each.build(case, one) for one in problems]
                calls[each.label] = captured(steps, device) if graph else steps[0]
            except Exception as error:  # a graph may fail where a call does not
                found.append(_thrown(each, error))
        samples = (timer or functools.partial(in_turns, device=device))(calls, rounds)
    spreads: dict[Contender, Spread] = {
        each: spread([ms / len(problems) for ms in samples[each.label]]) for each in timed if each.label in calls
    }
    frozen = spreads[FROZEN].p50 if FROZEN in spreads else None
    best = min((spreads[each].p50 for each in spreads if each.is_rival(case.dtype)), default=None)
    timings = [
        Timing(
            case, each, plan_label(case, each.backend, device) if each.ours else "", *times,
            frozen and times.p50 / frozen, best and times.p50 / best,
        )
        for each, times in spreads.items()
    ]  # fmt: skip
    return Trial(timings, found)


def _copies(problem: MultiProblem, most: int) -> list[MultiProblem]:
    """Return enough copies of the problem to keep its operands out of the L2 cache."""
    slots = problem.slots
    size = sum(T.numel() * T.element_size() for T in (problem.X, problem.W, slots.A, slots.B))
    count = min(most, max(2, math.ceil(GRAPH_BYTES / size)))
    return [problem, *(_copy(problem) for _ in range(count - 1))]


def _copy(problem: MultiProblem) -> MultiProblem:
    """Return a copy in other memory with equal values and strides; ids, starts, ranks and scalings are shared."""
    slots = problem.slots._replace(A=problem.slots.A.clone(), B=problem.slots.B.clone())
    return replace(problem, X=problem.X.clone(), W=problem.W.clone(), slots=slots)


def in_turns(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, seconds: float = math.inf
) -> dict[str, list[float]]:
    """Return the milliseconds of each call, once per round, without the first round; the order rotates.

    A GPU's L2 is swept before each call. After ``seconds`` and at least four rounds no round is started.
    """
    names, began, queueing = list(calls), time.perf_counter(), 0.0
    samples: dict[str, list[float]] = {name: [] for name in names}
    on_gpu = device.type == "cuda"
    sweep = torch.ones(SWEEP_BYTES // 4, device=device) if on_gpu else torch.ones(1)
    for number in range(rounds + 1):
        if number > 4 and time.perf_counter() - began > seconds:
            break
        first = number % max(len(names), 1)
        order = names[first:] + names[:first]
        taken = _cuda_round(calls, order, sweep, queueing) if on_gpu else _host_round(calls, order)  # type: ignore[arg-type]
        queueing = sum(times.host_us + SWEEP_HOST_US for times in taken.values()) * 1e-6
        for name, times in taken.items():
            if number > 0:
                samples[name].append(times.us / 1e3)
    return samples
