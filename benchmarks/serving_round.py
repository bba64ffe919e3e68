"""Serving in a GPU round: every plan by the rule, launches counted, decode and prefill tables, replays of one graph.

A unit's first word is its plan: what hangs costs the plan's other units, and no other plan's.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import tools
from benchmarks.cases import DTYPES
from benchmarks.measure import Bench, DeviceBroken, Found
from benchmarks.rows import Check
from benchmarks.serving import check_of, checks_of, measured
from benchmarks.serving_cases import CHECKED, DECODE, PREFILL, REPLAYED, SANITIZED, tiny
from lora_kernels import BackendUnavailableError, multi_lora_linear
from lora_kernels.check.serving.cases import ServingCase
from lora_kernels.check.serving.measure import judged, oracle_of
from lora_kernels.check.serving.rivals import (
    ALL_SLOTS,
    FROZEN,
    TWO_LAUNCHES,
    Contender,
    contenders,
    ours,
    planned_launches,
    refusal,
)
from lora_kernels.testing import within_rule
from lora_kernels.testing.multi import DISTRIBUTIONS, MultiProblem, mix_ids, multi_plain, multi_truth
from lora_kernels.tuning.measure import captured

Unit = Callable[[Bench], Found]
PLANS = {"eager": "triton:eager", "extend": "triton:extend", "decode": "triton:decode", "cuda": "cuda"}
ONE_LAUNCH = ("decode", "cuda")
REPLAYS = 10_000
MIXES = 36


def units(rehearse: bool) -> Iterator[tuple[str, Unit]]:
    """In order of importance; a rehearsal has one of each kind."""
    dtypes = list(DTYPES.values())[: 1 if rehearse else None]
    for plan, dtype in itertools.product(PLANS, dtypes):
        for case in _some(CHECKED[1:4] if rehearse else CHECKED, rehearse):
            one = dataclasses.replace(case, dtype=dtype)
            if not (plan in ONE_LAUNCH and one.phase == "prefill"):
                yield f"{plan} rule {one}", partial(by_rule, one, PLANS[plan])
    for plan in PLANS:
        yield f"{plan} launches", partial(launches, _some(DECODE[:1], rehearse)[0], plan)
    yield from _table(DECODE, ("auto", *ONE_LAUNCH), ("fwd_graph",), rehearse)
    for plan in PLANS:
        (case,) = _some([REPLAYED], rehearse)
        count, mixes = (10, len(DISTRIBUTIONS)) if rehearse else (REPLAYS, MIXES)
        yield f"{plan} replays {case}", partial(replays, case, plan, count, mixes)
    yield from _table(PREFILL, ("auto", "extend"), ("fwd",), rehearse)
    if not rehearse:
        yield from _table(DECODE[:8], ("auto",), ("fwd",), rehearse)


def watched(rehearse: bool) -> Iterator[tuple[str, Unit]]:
    """compute-sanitizer over ``sanitized``."""
    for kind in ("memcheck", "racecheck"):
        yield f"serving {kind}", partial(_sanitize, kind, rehearse)


def sanitized(rehearse: bool) -> Iterator[tuple[str, Unit]]:
    """What runs under compute-sanitizer: every plan on a small batch."""
    for plan in PLANS:
        (case,) = _some([SANITIZED], rehearse)
        yield f"{plan} rule {case}", partial(by_rule, case, PLANS[plan])


def _some(cases: Sequence[ServingCase], rehearse: bool) -> list[ServingCase]:
    return list(dict.fromkeys(tiny(case) if rehearse else case for case in cases))


def _table(
    cases: Sequence[ServingCase], plans: Sequence[str], modes: Sequence[str], rehearse: bool
) -> Iterator[tuple[str, Unit]]:
    """The planner's choice beside every rival; a named plan beside the frozen layer and the two best of them."""
    for case in _some(cases[3:4] if rehearse else cases, rehearse):
        for plan, mode in itertools.product(plans, modes):
            yield f"{plan} {mode} {case}", partial(_timed, case, plan, mode, rehearse)


def _timed(case: ServingCase, plan: str, mode: str, rehearse: bool, bench: Bench) -> Found:
    few: list[Contender] = [FROZEN, ours(PLANS.get(plan, "triton")), TWO_LAUNCHES, ALL_SLOTS]
    if plan == "auto":
        others = [each for each in contenders(case, bench.device) if not each.ours and each not in few]
        few += [each for each in others if not (rehearse and each.needs)]
    return measured(case, mode, few, bench)


def by_rule(case: ServingCase, backend: str, bench: Bench) -> Found:
    """One plan on one batch by the error rule, on memory filled with NaN."""
    found = checks_of(case, list(judged(case, [ours(backend)], bench.device)))
    whole(bench.device)
    return [], found


def launches(case: ServingCase, plan: str, bench: Bench) -> Found:
    """What one call puts on the GPU, by the profiler; elsewhere by the plan's own list.

    A one-launch plan has one, with no copy and no memset beside it. Others are told and not judged: the library may
    split its product.
    """
    name = ours(PLANS[plan]).label
    if why := refusal(case, PLANS[plan], bench.device):
        return [], [check_of(case, name, "refused", why, "launches")]
    count = planned_launches(case, PLANS[plan], bench.device)
    if bench.device.type == "cuda":
        with torch.no_grad():
            count = launches_counted(ours(PLANS[plan]).build(case, oracle_of(case, bench.device).problem))
    wrong = plan in ONE_LAUNCH and count != 1
    how = "counted" if bench.device.type == "cuda" else "planned"
    return [], [check_of(case, name, "failed" if wrong else "ok", f"{count} launches {how}", "launches")]


def launches_counted(call: Callable[[], object]) -> int:
    """What one call puts on the GPU, by the profiler: kernels, copies and sets of memory."""
    from torch.profiler import ProfilerActivity, profile

    call()  # what is compiled or allocated once does not count
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in seen.events())


class Mix:
    """What of a batch is data of the device: ids, ranks (some slots emptied) and scalings."""

    def __init__(self, case: ServingCase, problem: MultiProblem, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        device, kept = problem.X.device, torch.rand(case.L, generator=generator) < 0.8
        distribution = DISTRIBUTIONS[number % len(DISTRIBUTIONS)]
        self.ids = mix_ids(distribution, case.M, case.L, seed=number, device=device)
        self.ranks = torch.where(kept.to(device), problem.slots.ranks, 0).to(torch.int32)
        order = torch.randperm(case.L, generator=generator)
        self.scalings = problem.slots.scalings[order.to(device)]

    def enter(self, problem: MultiProblem) -> None:
        """Write it where the graph reads."""
        problem.ids.copy_(self.ids)
        problem.slots.ranks.copy_(self.ranks)
        problem.slots.scalings.copy_(self.scalings)


def replays(case: ServingCase, plan: str, count: int, different: int, bench: Bench) -> Found:
    """One captured graph under ``count`` mixes gives the bits of eager calls, which are right by the rule.

    ``different``: how many mixes there are, in turn.
    """
    backend, given = PLANS[plan], case.problem(bench.device)
    name, held = ours(backend).label, given.slots
    slots = held._replace(ranks=held.ranks.clone(), scalings=held.scalings.clone())
    problem = dataclasses.replace(given, ids=given.ids.clone(), slots=slots)
    made: dict[str, Tensor] = {}

    def call() -> Tensor:
        made["Y"] = multi_lora_linear(problem.X, problem.W, problem.slots, problem.ids, problem.bias, backend=backend)
        return made["Y"]

    found: list[Check] = []
    mixes = [Mix(case, given, number) for number in range(different)]
    try:
        with torch.no_grad():
            expected = []
            for number, mix in enumerate(mixes):
                mix.enter(problem)
                expected.append(call().clone())
                if number < len(DISTRIBUTIONS):
                    found.append(_right(case, name, problem, expected[-1]))
            replay = captured([call], bench.device)
            wrong = torch.zeros((), dtype=torch.int64, device=bench.device)
            for step in range(count):
                number = 7 * step % different  # neighbours of another distribution
                mixes[number].enter(problem)
                replay()
                wrong += (made["Y"] != expected[number]).any()
            differing = int(wrong)
    except BackendUnavailableError as why:
        return [], [check_of(case, name, "refused", str(why), "replays")]
    except Exception as error:
        whole(bench.device)
        return [], [*found, check_of(case, name, "failed", f"{type(error).__name__}: {error}"[:300], "replays")]
    told = f"{differing} of {count} replays differ from the eager call" if differing else f"{count} replays"
    return [], [*found, check_of(case, name, "failed" if differing else "ok", told, "replays")]


def _right(case: ServingCase, name: str, problem: MultiProblem, Y: Tensor) -> Check:
    with torch.enable_grad():
        verdict = within_rule(Y, multi_plain(problem).Y, multi_truth(problem).Y, dtype=case.dtype)
    ratios = verdict.max_ratio, verdict.rms_ratio
    return check_of(case, name, "ok" if verdict.ok else "failed", "" if verdict.ok else verdict.message, ratios=ratios)


def whole(device: torch.device) -> None:
    """Raise DeviceBroken where the device answers nothing any more."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError as broken:
        raise DeviceBroken(str(broken)) from broken


def _sanitize(kind: str, rehearse: bool, bench: Bench) -> Found:
    if rehearse:  # its units are rehearsed by their kind above
        return [], [check_of(SANITIZED, f"compute-sanitizer {kind}", "not run", "rehearsed without it", kind)]
    found: Any = tools.sanitize(kind, False, tools.SERVING_PHASE)
    return [], [dataclasses.replace(found, check=f"{kind} multi_lora_linear")]
