"""The phases of a GPU round: each is a list of named units, and a unit gives rows and checks.

A unit is what a cut-off round keeps or repeats; a phase is what a hang can cost.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks import checks
from benchmarks.cases import BERT, DTYPES, FEW_ROWS, GRID, SANITIZED, TARGET_CASES, Case, checked_cases, distinct, tiny
from benchmarks.gemm import plain_gemm
from benchmarks.measure import Bench, Found, measure, recorded
from benchmarks.rivals import FROZEN, PEFT_COMPILED, TRITON_BACKENDS, Implementation, contenders, ours
from benchmarks.roofline import Ceilings, measure_ceilings
from benchmarks.rows import Check
from benchmarks.timing import MIB, Clock, CudaClock, RehearsalClock

Unit = Callable[[Bench], Found]
Units = Iterator[tuple[str, Unit]]


@dataclass(frozen=True)
class Phase:
    """``estimate``: seconds it should take on an H100, with less left it is not begun; ``limit``: the most it gets.

    ``shards``: processes that share its units, above one only where nothing is timed.
    """

    name: str
    estimate: float
    limit: float
    shards: int = 1


PHASES = (
    Phase("check", 60, 180, shards=12),
    Phase("gemm", 40, 90),
    Phase("target", 90, 240),
    Phase("small", 90, 210),
    Phase("compile", 45, 120),
    Phase("sanitize", 30, 90),
    Phase("grid", 90, 300),
)
NAMED = TRITON_BACKENDS[1:]  # every plan by name
INNER = "sanitized"  # what phase sanitize runs under the sanitizer


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
        return Bench(self.device, clock, ceilings, **({"rounds": 1, "copies": 2} if self.rehearse else {}))

    def units(self, phase: str) -> dict[str, Unit]:
        """The units of a phase by name, in order of importance."""
        return {f"{phase}/{name}": unit for name, unit in getattr(self, f"_{phase}")()}

    def _ceilings(self, clock: Clock) -> Ceilings:
        """This machine's, measured once a round."""
        kept = self.out / "ceilings.json"
        if not kept.exists():
            side, copied = (64, MIB) if self.rehearse else (8192, 1024 * MIB)
            measured = measure_ceilings(clock, self.device, tuple(DTYPES.values()), side, copied)
            unfinished = kept.with_suffix(".part")
            unfinished.write_text(json.dumps(dataclasses.asdict(measured)))
            os.replace(unfinished, kept)
        return Ceilings(**json.loads(kept.read_text()))

    def _cases(self, cases: Sequence[Case]) -> list[Case]:
        return distinct([tiny(case) if self.rehearse else case for case in cases])

    def _timed(
        self, cases: Sequence[Case], modes: Sequence[str], implementations: Sequence[Implementation] = ()
    ) -> Units:
        cases = self._cases(cases)
        for number, mode in enumerate(modes):
            for case in [cases[-(number % 2)]] if self.rehearse else cases:  # the last: dropout, and the largest rank
                yield f"{mode} {case}", partial(measure, case, mode, implementations or self._contenders(case.dtype))

    def _contenders(self, dtype: torch.dtype) -> list[Implementation]:
        """All of them; a rehearsal leaves PEFT, five seconds of imports, to the phases target and compile."""
        return [each for each in contenders(dtype) if not (self.rehearse and each.needs)]

    def _check(self) -> Units:
        backends = [*NAMED, "reference"]
        for case in self._cases(checked_cases()):
            yield f"rule {case}", partial(_by_rule, case, backends)
        seeds = ((7, 0), (-5, (1 << 40) + 3), ((1 << 62) + 1, 9))
        rows, columns, draws = (18, 40, 64) if self.rehearse else (150, 456, 65536)
        repeated = [Case(256, 512, 768, 16), Case(256, 512, 768, 16, 0.1), Case(2048, 4096, 4096, 16, 0.1)]
        masks = partial(checks.masks_agree, seeds=seeds[:2] if self.rehearse else seeds)
        for dtype in DTYPES.values():
            for backend in NAMED:
                case = Case(rows, 16, columns, 16, 0.1, dtype)
                yield f"mask {backend} {case}", partial(_checked, masks, case, backend)
                for case in self._cases([dataclasses.replace(case, dtype=dtype) for case in repeated]):
                    yield f"bits {backend} {case}", partial(_checked, checks.same_bits, case, backend)
        for p in (0.1, 0.5):
            case = Case(draws, 16, 64, 16, p)
            yield f"keep rate {case}", partial(_checked, checks.keep_rate, case, "triton:shrink_extend")

    def _gemm(self) -> Units:
        shapes = {(case.M, case.N, case.K): case for case in reversed(self._cases(TARGET_CASES))}
        for case in reversed(shapes.values()):
            yield f"product {case}", partial(plain_gemm, case)

    def _target(self) -> Units:
        yield from self._timed(TARGET_CASES, ("fwd", "fwd_bwd"), contenders(TARGET_CASES[0].dtype))

    def _small(self) -> Units:
        yield from self._timed(FEW_ROWS, ("fwd_graph", "fwd", "fwd_bwd_graph", "fwd_bwd"))
        yield from self._timed(BERT, ("fwd_bwd", "fwd"))

    def _grid(self) -> Units:
        yield from self._timed(GRID, ("fwd_bwd", "fwd"))

    def _compile(self) -> Units:
        yield from self._timed(TARGET_CASES, ("fwd_bwd", "fwd"), [FROZEN, ours("triton"), PEFT_COMPILED])

    def _sanitize(self) -> Units:
        yield "memcheck", lambda bench: ([], [self._memcheck()])

    def _sanitized(self) -> Units:
        dtypes = list(DTYPES.values())
        for case in SANITIZED[:1] if self.rehearse else SANITIZED:
            for dtype in dtypes[:1] if self.rehearse else dtypes:
                case = dataclasses.replace(case, dtype=dtype, p=0.1)
                yield f"rule {case}", partial(_by_rule, case, NAMED)

    def _memcheck(self) -> Check:
        """compute-sanitizer over small shapes, without the caching allocator, so that every overrun leaves a block."""
        tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        case, name = SANITIZED[0], "compute-sanitizer memcheck"
        if tool is None and not self.rehearse:
            return checks.not_run(case, name, "compute-sanitizer is not on this machine", check="memcheck")
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.worker", "--phase", INNER, "--out", folder]
            if self.rehearse:
                command.append("--rehearse")
            else:
                command = [str(tool), "--tool", "memcheck", "--error-exitcode", "9", *command]
            done = subprocess.run(
                command, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True
            )
        said = " | ".join((done.stdout + done.stderr).splitlines()[-6:])
        message = f"exit status {done.returncode}: {said}"
        if self.rehearse and done.returncode == 0:
            return checks.not_run(case, name, "rehearsed without the sanitizer", check="memcheck")
        return checks.judged(case, name, done.returncode == 0, message, check="memcheck")


def _by_rule(case: Case, backends: Sequence[str], bench: Bench) -> Found:
    """Every backend on one case by the error rule, bias included."""
    oracle = checks.Oracle(checks.problem_of(case, bench.device, bias=True))
    found: list[Check] = []
    for backend in backends:
        with recorded(case, ours(backend), found):
            found += checks.judge(case, oracle, ours(backend))
    return [], found


def _checked(
    make: Callable[[Case, torch.device, str], Iterator[Check]], case: Case, backend: str, bench: Bench
) -> Found:
    return [], list(make(case, bench.device, backend))
