"""The phases of a GPU round: each is a list of named units, and a unit gives rows and checks.

A unit is what a cut-off round keeps or repeats; what hangs costs its unit, and where units are grouped by plan the
other units of that plan in the phase.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks import checks, extras, serving_round, tools
from benchmarks.blocks import our_block, rivals_of
from benchmarks.cases import (
    BERT,
    BLOCKS,
    CHECKED,
    CHECKED_BLOCKS,
    DTYPES,
    FEW_ROWS,
    GRID,
    RANKS,
    SANITIZED,
    TARGET_CASES,
    Case,
    checked_cases,
    distinct,
    tiny,
)
from benchmarks.gemm import plain_gemm, rungs
from benchmarks.masks import keep_rate, masks_agree
from benchmarks.measure import Bench, Found, measure, recorded
from benchmarks.rivals import (
    ADDMM_CHAIN,
    FROZEN,
    OPT_IN_BACKENDS,
    PEFT_COMPILED,
    TRITON_BACKENDS,
    Implementation,
    contenders,
    ours,
)
from benchmarks.roofline import Ceilings, ceiling_rows, ceilings_of, measure_ceilings
from benchmarks.rows import Check, Journal, record, this_machine
from benchmarks.timing import MIB, Clock, CudaClock, RehearsalClock

Unit = Callable[[Bench], Found]
Units = Iterator[tuple[str, Unit]]


NAMED = TRITON_BACKENDS[1:]  # every plan that may be chosen, by name


def plan_of(backend: str) -> str:
    """ "one_pass" of "triton:one_pass"."""
    return backend.partition(":")[2]


@dataclass(frozen=True)
class Round:
    """What one process of a round can do; ``rehearse``: on a CPU, in Triton's interpreter, with tiny shapes."""

    out: Path
    rehearse: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else "cuda")

    def bench(self) -> Bench:
        clock: Clock = RehearsalClock() if self.rehearse else CudaClock(self.device)
        ceilings = functools.cache(partial(self._ceilings, clock))
        return Bench(self.device, clock, ceilings, **({"rounds": 1, "copies": 2, "warmup": 0} if self.rehearse else {}))

    def units(self, phase: str) -> dict[str, Unit]:
        """The units of a phase by name, in order of importance."""
        return {f"{phase}/{name}": unit for name, unit in getattr(self, f"_{phase}")()}

    def _ceilings(self, clock: Clock) -> Ceilings:
        """This machine's, measured once a round."""
        journal = Journal(self.out)
        known = ceilings_of(journal.rows())
        if known is None:
            side, copied = (64, MIB) if self.rehearse else (8192, 1024 * MIB)
            known = measure_ceilings(clock, self.device, tuple(DTYPES.values()), side, copied)
            machine = this_machine(self.rehearse)
            journal.append("ceilings", [record(row, machine) for row in ceiling_rows(known, side)], [])
        return known

    def _cases(self, cases: Sequence[Case]) -> list[Case]:
        return distinct([tiny(case) if self.rehearse else case for case in cases])

    def _timed(
        self, cases: Sequence[Case], modes: Sequence[str], implementations: Sequence[Implementation] = ()
    ) -> Units:
        cases = self._cases(cases)
        if self.rehearse:  # the first, and the last: dropout, and the largest rank
            for number, mode in enumerate(modes):
                case = cases[-(number % 2)]
                yield f"{mode} {case}", partial(measure, case, mode, implementations or self._contenders(case))
            return
        for case in cases:
            for mode in modes:
                yield f"{mode} {case}", partial(measure, case, mode, implementations or self._contenders(case))

    def _contenders(self, case: Case) -> list[Implementation]:
        """All of them; a rehearsal leaves PEFT, five seconds of imports, to the phases target and compile."""
        return [each for each in rivals_of(case, TRITON_BACKENDS) if not (self.rehearse and each.needs)]

    def _gemm(self) -> Units:
        shapes = {(case.M, case.N, case.K): case for case in reversed(self._cases(TARGET_CASES))}
        cases = list(reversed(shapes.values()))
        for case in cases[:1] if self.rehearse else cases:
            for rung in rungs():
                yield f"{rung} product {case}", partial(plain_gemm, case, rung)

    def _check(self) -> Units:
        backends = [*NAMED, "reference"]
        for case in self._some(checked_cases()):
            yield f"rule {case}", partial(_by_rule, case, [ours(backend) for backend in backends])
        for case in self._some([dataclasses.replace(c, p=p) for p in (0.0, 0.1) for c in CHECKED_BLOCKS]):
            for dtype in self._dtypes():
                one = dataclasses.replace(case, dtype=dtype)
                yield f"rule {one}", partial(_by_rule, one, [our_block(backend) for backend in TRITON_BACKENDS[:3]])
        yield from self._masks_and_bits(NAMED, self._dtypes())
        for p in (0.1, 0.5):
            case = Case(64 if self.rehearse else 65536, 16, 64, 16, p)
            yield f"keep rate {case}", partial(_checked, keep_rate, case, "triton:shrink_extend")

    def _some(self, cases: Sequence[Case]) -> list[Case]:
        """All cases; of a rehearsal's one of each operator, dtype and dropout, and all in the first dtype."""
        kept: dict[object, Case] = {}
        for case in self._cases(cases):
            first = case.dtype == cases[0].dtype and case.op == "lora_linear"
            kept.setdefault(case if first or not self.rehearse else (case.op, case.dtype, case.p), case)
        return list(kept.values())

    def _dtypes(self) -> list[torch.dtype]:
        return list(DTYPES.values())[: 1 if self.rehearse else None]

    def _masks_and_bits(self, backends: Sequence[str], dtypes: Sequence[torch.dtype]) -> Units:
        seeds = ((7, 0), (-5, (1 << 40) + 3), ((1 << 62) + 1, 9))
        rows, columns = (18, 40) if self.rehearse else (150, 456)
        repeated = [Case(256, 512, 768, 16), Case(256, 512, 768, 16, 0.1), Case(2048, 4096, 4096, 16, 0.1)]
        masks = partial(masks_agree, seeds=seeds[1:2] if self.rehearse else seeds)
        for dtype in dtypes:
            for backend in backends:
                case = Case(rows, 16, columns, 16, 0.1, dtype)
                yield f"{plan_of(backend)} mask {case}", partial(_checked, masks, case, backend)
                for case in self._cases([dataclasses.replace(case, dtype=dtype) for case in repeated]):
                    yield f"{plan_of(backend)} bits {case}", partial(_checked, checks.same_bits, case, backend)

    def _target(self) -> Units:
        yield from self._timed(TARGET_CASES, ("fwd_bwd", "fwd"), contenders(TARGET_CASES[0].dtype))

    def _opt_in_check(self) -> Units:
        checked = CHECKED[:1] if self.rehearse else CHECKED[:6]
        for backend in OPT_IN_BACKENDS:
            for dtype in self._dtypes()[:2]:  # those of 16 bits
                for case in self._cases([dataclasses.replace(c, p=p) for c in checked for p in (0.0, 0.1)]):
                    one = dataclasses.replace(case, dtype=dtype)
                    yield f"{plan_of(backend)} rule {one}", partial(_by_rule, one, [ours(backend)])
            yield from self._masks_and_bits([backend], self._dtypes()[:1])

    def _opt_in(self) -> Units:
        for case in self._cases([*TARGET_CASES, *FEW_ROWS[2:]])[: 1 if self.rehearse else None]:
            for backend in OPT_IN_BACKENDS:
                for mode in ("fwd_bwd", "fwd"):
                    few = [FROZEN, ours(backend), ADDMM_CHAIN]
                    yield f"{plan_of(backend)} {mode} {case}", partial(measure, case, mode, few)

    def _small(self) -> Units:
        yield "overhead", partial(extras.overhead_rows, self.rehearse)
        yield from self._timed(FEW_ROWS, ("fwd_graph", "fwd", "fwd_bwd_graph", "fwd_bwd"))
        yield from self._timed(BERT, ("fwd_bwd", "fwd"))

    def _serving(self) -> Units:
        yield from serving_round.units(self.rehearse)

    def _serving_sanitized(self) -> Units:
        yield from serving_round.sanitized(self.rehearse)

    def _blocks(self) -> Units:
        for op in ("lora_linear_stacked", "lora_mlp"):
            modes = ("fwd_bwd",) if self.rehearse else ("fwd_bwd", "fwd")
            yield from self._timed([case for case in BLOCKS if case.op == op], modes)

    def _tune(self) -> Units:
        yield from extras.tune_units(self.out, self.rehearse)

    def _step(self) -> Units:
        yield from extras.training_units(self.rehearse)

    def _accelerate(self) -> Units:
        yield from extras.step_units(self.rehearse)

    def _grid(self) -> Units:
        yield from self._timed([*RANKS, *GRID], ("fwd_bwd", "fwd"))

    def _compile(self) -> Units:
        yield from self._timed(TARGET_CASES, ("fwd_bwd", "fwd"), [FROZEN, ours("triton"), PEFT_COMPILED])

    def _tools(self) -> Units:
        for kind in ("memcheck", "racecheck"):
            yield kind, lambda bench, kind=kind: ([], [tools.sanitize(kind, self.rehearse)])  # type: ignore[misc]
        yield from serving_round.watched(self.rehearse)
        yield "ncu", lambda bench: ([], [tools.profile(self.out, self.rehearse)])

    def _sanitized(self) -> Units:
        """Plans that wait for nobody: under a tool that runs blocks one after another a flag is never set."""
        dtypes = list(DTYPES.values())
        for case in SANITIZED[:1] if self.rehearse else SANITIZED:
            for dtype in dtypes[:1] if self.rehearse else dtypes:
                case = dataclasses.replace(case, dtype=dtype, p=0.1)
                yield f"rule {case}", partial(_by_rule, case, [ours(backend) for backend in NAMED])

    def _profiled(self) -> Units:
        case = self._cases([Case(4096, 4096, 4096, 16, 0.1)])[0]
        yield f"step {case}", partial(_by_rule, case, [ours("triton:shrink_extend")])


def _by_rule(case: Case, implementations: Sequence[Implementation], bench: Bench) -> Found:
    """Every implementation on one case by the error rule, bias included."""
    oracle = checks.Oracle(checks.problem_of(case, bench.device, bias=True))
    found: list[Check] = []
    for implementation in implementations:
        with recorded(case, implementation, found):
            found += checks.judge(case, oracle, implementation)
    return [], found


def _checked(
    make: Callable[[Case, torch.device, str], Iterator[Check]], case: Case, backend: str, bench: Bench
) -> Found:
    found: list[Check] = []
    with recorded(case, ours(backend), found, "determinism"):
        found += make(case, bench.device, backend)
    return [], found
