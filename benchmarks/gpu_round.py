"""A GPU round: ``python -m benchmarks.gpu_round --budget SECONDS --out DIR [--rehearse]``.

Runs the phases of phases.py in order of importance, each in processes of its own with a time limit, keeps what is
finished in DIR (started again with the same DIR it goes on there), and prints a short table last:

    journal.jsonl   finished units, one line each: the record that the tables are written from
    rows.csv        timings (rows.Row)          checks.csv   correctness (rows.Check)
    phases.csv      what was run, left out, cut off, and why
    round.log       what the phases printed     ceilings.json   measured matrix and copy rates

--rehearse walks through the same code on a CPU in Triton's interpreter, with tiny shapes and a clock that always says
one millisecond. Its rows carry gpu="rehearsal"; a folder holds a rehearsal or a round, never both.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from benchmarks.measure import DeviceBroken
from benchmarks.phases import INNER, PHASES, Phase, Round
from benchmarks.rows import REHEARSAL, Check, Journal, record, this_machine, write_csv
from benchmarks.summary import summary

DEVICE_BROKEN = 3  # exit status of a phase process whose GPU context is gone: what is left goes to a fresh one
GRACE = 10.0  # seconds a process gets to finish its unit beyond the phase's limit
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Outcome:
    """One line of phases.csv."""

    phase: str
    status: str
    units: int
    of: int
    seconds: float
    detail: str = ""

    def __str__(self) -> str:
        tail = f"; {self.detail}" if self.detail else ""
        return f"{self.status}: {self.units} of {self.of} units, {self.seconds:.0f} s{tail}"


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.phase:
        return run_units(options)
    if not options.rehearse and not torch.cuda.is_available():
        print("no CUDA device here; --rehearse walks through the round on a CPU", file=sys.stderr)
        return 2
    journal = Journal(options.out)
    strangers = {
        row["gpu"] for row in journal.rows() + journal.checks() if (row["gpu"] == REHEARSAL) != options.rehearse
    }
    if strangers:
        print(f"{options.out} holds rows of {', '.join(sorted(strangers))}; name another folder", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are ended, too
    outcomes = run_round(options, journal)
    print(summary(journal.rows(), journal.checks(), [vars(outcome) for outcome in outcomes]))
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_round", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for the whole round (default 540)")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for rows.csv, checks.csv, ...; resumed if it exists"
    )
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny shapes, made-up times")
    parser.add_argument("--only", help="comma-separated phases: " + ", ".join(phase.name for phase in PHASES))
    parser.add_argument("--phase", help=argparse.SUPPRESS)  # the rest: what the round passes to its own processes
    parser.add_argument("--shard", default="0/1", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=float("inf"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    names = [phase.name for phase in PHASES]
    if options.only and (unknown := set(options.only.split(",")) - set(names)):
        parser.error(f"unknown phases {', '.join(sorted(unknown))}; accepted are {', '.join(names)}")
    if options.phase and options.phase not in [*names, INNER]:
        parser.error(f"unknown phase {options.phase}")
    return options


def run_round(options: argparse.Namespace, journal: Journal) -> list[Outcome]:
    """Every phase that fits the budget; phases.csv and the tables are up to date after each."""
    deadline = time.monotonic() + options.budget
    outcomes: list[Outcome] = []
    only = options.only.split(",") if options.only else [phase.name for phase in PHASES]
    with (options.out / "round.log").open("a") as log:
        for phase in PHASES:
            left = deadline - time.monotonic()
            todo = list(Round(options.out, options.rehearse).units(phase.name))
            done = _done(journal, todo)
            if phase.name not in only:
                outcome = Outcome(phase.name, "left out", done, len(todo), 0.0, "not named by --only")
            elif done == len(todo):
                outcome = Outcome(phase.name, "done before", done, len(todo), 0.0)
            elif phase.estimate > left:
                why = f"needs about {phase.estimate:.0f} s, {max(left, 0):.0f} s are left"
                outcome = Outcome(phase.name, "skipped", done, len(todo), 0.0, why)
            else:
                outcome = run_phase(phase, todo, min(phase.limit, left), options, journal, log)
            outcomes.append(outcome)
            journal.write_tables()
            write_csv(options.out / "phases.csv", list(vars(outcome)), [vars(known) for known in outcomes])
            print(
                f"[{outcome.phase}] {outcome.status}: {outcome.units}/{outcome.of} units, {outcome.seconds:.0f} s",
                end="",
            )
            print(f", {outcome.detail}" if outcome.detail else "", flush=True)
    return outcomes


def _done(journal: Journal, units: Sequence[str]) -> int:
    return len(journal.done().intersection(units))


def run_phase(
    phase: Phase, todo: Sequence[str], seconds: float, options: argparse.Namespace, journal: Journal, log: IO[str]
) -> Outcome:
    """One phase in its processes: ended when its seconds are over, begun anew where an error broke the GPU context."""
    started = time.monotonic()
    shards = min(phase.shards, os.cpu_count() or 1)
    running: dict[int, subprocess.Popen[bytes]] = {}
    detail, size = [], -1
    try:
        for shard in range(shards):
            running[shard] = _spawn(phase, shard, shards, seconds, options, log)
        while running:
            time.sleep(0.2)
            over = time.monotonic() - started > seconds
            if journal.path.exists() and journal.path.stat().st_size != size:
                size = journal.path.stat().st_size
                journal.write_tables()
            for shard, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[shard]
                if code == DEVICE_BROKEN and not over:
                    left = seconds - (time.monotonic() - started)
                    running[shard] = _spawn(phase, shard, shards, left, options, log)
                elif code not in (0, 1):
                    detail.append(f"process {shard} ended with status {code}, see round.log")
            if time.monotonic() - started > seconds + (0 if seconds < phase.limit else GRACE):
                detail.append(f"cut off after {seconds:.0f} s")
                break
    finally:
        for process in running.values():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    done = _done(journal, todo)
    status = "done" if done == len(todo) else "incomplete"
    return Outcome(phase.name, status, done, len(todo), time.monotonic() - started, "; ".join(detail))


def _spawn(
    phase: Phase, shard: int, shards: int, seconds: float, options: argparse.Namespace, log: IO[str]
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.gpu_round", "--phase", phase.name, "--shard", f"{shard}/{shards}"]
    command += ["--seconds", f"{seconds:.1f}", "--out", str(options.out.resolve())]
    environment = dict(os.environ)
    if options.rehearse:
        command.append("--rehearse")
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    else:
        environment.pop("TRITON_INTERPRET", None)
    # a session of its own: ended as a group, with whatever it started
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)


def run_units(options: argparse.Namespace) -> int:
    """A phase's process: the units of its shard that the journal lacks. 0, or 1 where a check failed."""
    started = time.monotonic()
    if options.rehearse:
        from lora_kernels.testing import interpreter

        torch.set_num_threads(1)
        interpreter.install()
    this = Round(options.out, options.rehearse)
    journal, bench, machine = Journal(options.out), this.bench(), this_machine(options.rehearse)
    shard, shards = (int(number) for number in options.shard.split("/"))
    units = list(this.units(options.phase).items())[shard::shards]
    done, failed = journal.done(), 0
    for name, unit in units:
        if name in done:
            continue
        if time.monotonic() - started > options.seconds:
            print(f"{name}: no time left", flush=True)
            continue
        begun = time.monotonic()
        try:
            rows, checks = unit(bench)
        except Exception as error:
            broken = Check(
                "unit", "", 0, 0, 0, 0, 0.0, "", name, "failed", message=f"{type(error).__name__}: {error}"[:300]
            )
            journal.append(name, [], [record(broken, machine)])
            if isinstance(error, DeviceBroken):
                print(f"{name}: {error}", flush=True)
                return DEVICE_BROKEN
            rows, checks = [], [broken]
        else:
            journal.append(name, [record(row, machine) for row in rows], [record(check, machine) for check in checks])
        bad = [check for check in checks if check.status == "failed"]
        failed += len(bad)
        print(f"{name}: {len(rows)} rows, {len(checks)} checks, {time.monotonic() - begun:.1f} s", flush=True)
        for check in bad:
            print(f"  FAILED {check.check} {check.implementation} {check.what}: {check.message}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
