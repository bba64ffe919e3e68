"""Measures every plan of LoRA linear layers on this GPU, and writes the tuned table that the planner reads.

Each candidate (a plan with some tiles) must pass the error rule against plain PyTorch before it is timed. The whole
table is written after each problem, so that a tune that was killed continues with the missing problems when it is
started again. It skips a candidate that ended the process.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from lora_kernels.atomic_write import atomic_write
from lora_kernels.errors import BackendUnavailableError
from lora_kernels.kernels.chip import Chip
from lora_kernels.planning import choose as planner
from lora_kernels.planning.cost import CallShape
from lora_kernels.planning.tuned import Entry, Measured, Table, TableError, dumps, loads, read, user_table
from lora_kernels.tuning.measure import Call, Candidate, TuningRun, candidate_label, candidates, timed

REHEARSAL = "rehearsal"
PRUNE_RATIO = 1.25  # candidates slower than this multiple of the fastest are not timed further


@dataclass(frozen=True)
class Progress:
    """Argument of on_progress: ``done`` of ``total`` problems, the current problem, and its state as text."""

    done: int
    total: int
    problem: CallShape | None
    text: str


@dataclass
class Outcome:
    """``entries``: of every given problem that was measured, now or before. ``left``: problems that were not measured.
    ``faults``: (problem, candidate, reason) of candidates that failed or were skipped. ``path``: the table.
    """

    path: Path
    entries: list[Entry] = field(default_factory=list)
    left: list[CallShape] = field(default_factory=list)
    faults: list[tuple[CallShape, str, str]] = field(default_factory=list)


def tune(
    problems: Sequence[CallShape],
    device: torch.device,
    budget: float | None = None,
    out: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    *,
    dropout_p: float = 0.1,
    rounds: int = 20,
    again: bool = False,
    rehearse: bool = False,
    commit: str = "",
) -> Outcome:
    """Measure ``problems`` in order, and write the table of ``device`` to ``out``, by default in the user's cache.

    Args:
        budget: seconds after which no new candidate starts; None for no limit.
        on_progress: called with a Progress before each problem and candidate.
        dropout_p: of problems with dropout.
        rounds: calls of each candidate, of which the median is used. Four rounds first exclude candidates above
            PRUNE_RATIO.
        again: also measure problems that the table has from these versions of PyTorch, Triton and this package.
        rehearse: run in Triton's interpreter; the table is marked as a rehearsal, and the planner never reads it.
        commit: of the sources, for the table; the package's version by default.

    Raises:
        BackendUnavailableError: kernels cannot run on ``device``, or the device no longer works after a fault.
    """
    if why := planner.triton_missing(device.type):
        raise BackendUnavailableError(f"tune cannot measure on {device}: {why}")
    if device.type != "cuda" and not rehearse:
        raise BackendUnavailableError(f"tune measures on a GPU, not on {device}; --rehearse goes through it all")
    chip = planner.chip_for(device)
    gpu = REHEARSAL if rehearse else chip.name
    outcome = Outcome(out or user_table(gpu))
    where = {"gpu": gpu, "commit": commit or _version("lora-kernels"), **_versions()}
    deadline = None if budget is None else time.monotonic() + budget
    attempts = _Attempts(outcome.path.with_name(f"{outcome.path.name}.attempts"), fresh=again)
    for number, q in enumerate(problems):
        entry = Table(_entries(outcome.path, gpu, rehearse)).exact(q)
        known = entry is not None and all(getattr(entry, name) == value for name, value in where.items())

        def tell(text: str, number: int = number, q: CallShape = q) -> None:
            if on_progress is not None:
                on_progress(Progress(number, len(problems), q, text))

        tell("measured before" if known and not again else "begun")
        if not known or again:
            try:
                measured = _measure(q, device, chip, dropout_p, rounds, deadline, attempts, outcome, tell)
            except torch.OutOfMemoryError as error:
                measured = None
                outcome.faults.append((q, "its operands", " ".join(str(error).split())[:200]))
            if measured is None:
                outcome.left.append(q)
                continue
            entry = _entry(q, measured, where)
            merged = Table([*_entries(outcome.path, gpu, rehearse), entry])  # read again: another tune may have written
            atomic_write(outcome.path, dumps(gpu, merged.entries, rehearse).encode())
        assert entry is not None
        outcome.entries.append(entry)
    if not outcome.left:
        attempts.close()
    planner.forget()
    return outcome


def _measure(
    q: CallShape,
    device: torch.device,
    chip: Chip,
    dropout_p: float,
    rounds: int,
    deadline: float | None,
    attempts: _Attempts,
    outcome: Outcome,
    tell: Callable[[str], None],
) -> tuple[Measured, ...] | None:
    """Every candidate that passed, with its times; None if the deadline came first."""
    if deadline is not None and time.monotonic() > deadline:
        return None
    run = TuningRun(q, device, chip, dropout_p)
    passed: dict[str, tuple[Candidate, Call]] = {}
    for plan, tiles in candidates(q, chip):
        label = candidate_label(plan, tiles)
        if deadline is not None and time.monotonic() > deadline:
            return None
        tell(label)
        call = run.call(plan, tiles)
        with attempts.attempt(f"{q} {label}") as blocked:
            fault = blocked or run.fault(call)
        if fault:
            outcome.faults.append((q, label, fault))
        else:
            passed[label] = (plan, tiles), call
    run.forget_truth()
    if "eager" not in passed:
        raise BackendUnavailableError(f"eager fails on {device} for {q}: {outcome.faults[-1][2]}")
    tell(f"timing {len(passed)} candidates")
    times = timed({label: call for label, (_, call) in passed.items()}, device, min(4, rounds))
    limit = PRUNE_RATIO * min(max(t) for t in times.values())
    close = {label: call for label, (_, call) in passed.items() if max(times[label]) <= limit or label == "eager"}
    times |= timed(close, device, rounds) if rounds > 4 else {}
    return tuple(
        Measured(*candidate, *(round(us, 3) for us in times[label])) for label, (candidate, _) in passed.items()
    )


class _Attempts:
    """Log of candidates that began and ended. A candidate that began and has no end in the log ended the process."""

    def __init__(self, path: Path, fresh: bool) -> None:
        self._path = path
        if fresh:
            self.close()
        open_ones: dict[str, None] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in path.read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError):  # a line that was cut off
                    verb, label = json.loads(line)
                    open_ones |= {label: None} if verb == "begin" else {}
                    if verb == "end":
                        open_ones.pop(label, None)
        self._fatal = set(open_ones)

    @contextlib.contextmanager
    def attempt(self, label: str) -> Iterator[str | None]:
        """Context of a candidate's first call. Yields why the call must be skipped, or None."""
        if label in self._fatal:
            yield "passed over: the last run ended in it (--again tries it once more)"
            return
        self._write("begin", label)
        try:
            yield None
        except KeyboardInterrupt:
            # Not a fault of the candidate. Any other error that arrives here means a broken device: no end is logged.
            self._write("end", label)
            raise
        self._write("end", label)

    def _write(self, verb: str, label: str) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps([verb, label]) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Delete the log."""
        self._path.unlink(missing_ok=True)


def _entries(path: Path, gpu: str, rehearsal: bool) -> list[Entry]:
    if not rehearsal:
        return read(path, gpu)
    try:
        return loads(path.read_text(), gpu, rehearsal)
    except (OSError, TableError):
        return []


def _entry(q: CallShape, measured: tuple[Measured, ...], where: dict[str, str]) -> Entry:
    return Entry(
        op=q.op, dtype=str(q.dtype).removeprefix("torch."), M=q.M, N=q.N, K=q.K, r=q.r, dropout=q.dropout, bits=q.bits,
        bias=q.bias, need_dx=q.need_dx, measured=measured, **where,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _versions() -> dict[str, str]:
    """Versions of torch, triton and the driver, by their field in Entry."""
    driver = ""
    if torch.cuda.is_available() and shutil.which("nvidia-smi"):
        command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        driver = done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""
    return {"torch": torch.__version__, "triton": _version("triton"), "driver": driver}
