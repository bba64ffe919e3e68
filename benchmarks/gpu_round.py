"""A GPU round: ``python -m benchmarks.gpu_round --budget SECONDS --out DIR [--rehearse]``.

Runs the phases of phases.py in order of importance, each in processes of its own with a time limit, keeps what is
finished in DIR (started again with the same DIR it goes on there), and prints a short table last:

    journal.jsonl   finished units, one line each: the record that the tables are written from
    rows.csv        timings (rows.Row)          checks.csv   correctness (rows.Check)
    phases.csv      what was run, left out or cut off, and why
    curves.csv      losses of whole runs        tuned.json   the planner's table, as kernels/tuned/<GPU>.json wants it
    round.log       what the phases printed     profile.csv  Nsight Compute's counters, where it may read them

Eight files at most. The phases take longer than ten minutes together: --only and --budget cut a round into pieces.

Where the files were copied without their history, BENCH_COMMIT says which commit they are.

--rehearse walks through the same code on a CPU in Triton's interpreter, with tiny shapes and a clock that always says
one millisecond. Its rows carry gpu="rehearsal"; a folder holds a rehearsal or a round, never both.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch

from benchmarks import checks
from benchmarks.phases import Round, Unit
from benchmarks.rows import REHEARSAL, Journal, record, this_machine, write_csv
from benchmarks.schedule import PHASES, Phase
from benchmarks.summary import summary
from benchmarks.worker import CHECKS_FAILED, DEVICE_BROKEN, share
from lora_kernels.finetune import values

GRACE = 10.0  # seconds a process gets to finish its unit beyond the phase's limit
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Outcome:
    """One line of phases.csv: ``done`` of ``units`` units are in the journal."""

    phase: str
    status: str
    done: int
    units: int
    seconds: float = 0.0
    detail: str = ""

    def __str__(self) -> str:
        tail = f"; {self.detail}" if self.detail else ""
        return f"[{self.phase}] {self.status}: {self.done} of {self.units} units, {self.seconds:.0f} s{tail}"


def main(argv: Sequence[str] | None = None) -> int:
    names = [phase.name for phase in PHASES]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_round", description="Check and measure on a GPU.")
    parser.add_argument(
        "--budget", type=values.seconds, default=540.0, help="seconds for the whole round (default 540)"
    )
    parser.add_argument(
        "--out", type=values.output_folder, required=True, help="folder for the tables; a round begun there goes on"
    )
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny shapes, made-up times")
    parser.add_argument("--only", default=",".join(names), help="phases, comma-separated (default: all, in this order)")
    options = parser.parse_args(argv)
    if unknown := set(options.only.split(",")) - set(names):
        parser.error(f"unknown phases {', '.join(sorted(unknown))}; accepted are {', '.join(names)}")
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("no CUDA device here; --rehearse walks through the round on a CPU")
    journal = Journal(options.out)
    known = {row["gpu"] for row in journal.rows() + journal.checks()}
    if strangers := {gpu for gpu in known if (gpu == REHEARSAL) != options.rehearse}:
        parser.error(f"{options.out} holds rows of {', '.join(sorted(strangers))}; name another folder")
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes of a phase are ended, too
    with (options.out / "round.log").open("a") as log:
        outcomes = Conductor(options.out, options.rehearse, journal, log).run(options.budget, options.only.split(","))
    print(summary(journal.rows(), journal.checks(), [vars(outcome) for outcome in outcomes]))
    return 0


@dataclass
class Shard:
    """A process of a phase, how many of its units are done, and since when it is at the next one."""

    process: subprocess.Popen[bytes] | None = None
    done: int = -1
    since: float = 0.0
    retries: int = 0

    def begin(self, process: subprocess.Popen[bytes]) -> None:
        self.process, self.since = process, time.monotonic()

    def note(self, done: int) -> None:
        if done != self.done:
            self.done, self.since = done, time.monotonic()

    def stuck_for(self) -> float:
        return time.monotonic() - self.since


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@dataclass
class Conductor:
    """Runs phases one after another; the tables are up to date after every unit."""

    out: Path
    rehearse: bool
    journal: Journal
    log: IO[str]

    def run(self, budget: float, only: Sequence[str]) -> list[Outcome]:
        """Every phase that fits the budget; one that does not is left out, and phases.csv says so."""
        deadline = time.monotonic() + budget
        outcomes: list[Outcome] = []
        for phase in PHASES:
            left = deadline - time.monotonic()
            units = list(Round(self.out, self.rehearse).units(phase.name))
            outcome = Outcome(phase.name, "done before", self._done(units), len(units))
            if phase.name not in only:
                outcome.status, outcome.detail = "left out", "not named by --only"
            elif outcome.done < len(units) and phase.estimate > left:
                outcome.status = "skipped"
                outcome.detail = f"needs about {phase.estimate:.0f} s, {max(left, 0):.0f} s are left"
            elif outcome.done < len(units):
                self._run_phase(phase, outcome, min(phase.limit, left), cut_by_budget=left < phase.limit)
                outcome.done = self._done(units)
                outcome.status = "done" if outcome.done == len(units) else "incomplete"
            outcomes.append(outcome)
            self.journal.write_tables()
            write_csv(self.out / "phases.csv", list(vars(outcome)), [vars(each) for each in outcomes])
            print(outcome, flush=True)
        (self.out / "tuned.json.attempts").unlink(missing_ok=True)  # what hung is in checks.csv
        return outcomes

    def _done(self, units: Sequence[str]) -> int:
        return len(self.journal.done().intersection(units))

    def _run_phase(self, phase: Phase, outcome: Outcome, seconds: float, cut_by_budget: bool) -> None:
        """The phase's processes until they end or its time does.

        One that a broken GPU context or a crash ended, or whose unit outlasts the phase's patience, is begun anew.
        """
        started = time.monotonic()
        count = min(phase.shards, os.cpu_count() or 1)
        shards = {f"{number}/{count}": Shard() for number in range(count)}
        troubles: list[str] = []
        size = -1
        try:
            for name, shard in shards.items():
                shard.begin(self._spawn(phase, name, seconds))
            while any(shard.process for shard in shards.values()):
                time.sleep(0.1)
                outcome.seconds = time.monotonic() - started
                left = seconds - outcome.seconds
                if self.journal.path.exists() and self.journal.path.stat().st_size != size:
                    size = self.journal.path.stat().st_size
                    self.journal.write_tables()
                    done = self.journal.done()
                    for name, shard in shards.items():
                        shard.note(len(done.intersection(self._share(phase, name))))
                for name, shard in shards.items():
                    if (process := shard.process) is None:
                        continue
                    code = process.poll()
                    if code is None and shard.stuck_for() > phase.patience and left > 0:
                        _kill(process)
                        if shard.retries < phase.retries:
                            shard.retries += 1
                        else:
                            self._blame(phase, name, f"did not end within {phase.patience:.0f} s", hung=True)
                        shard.process = None
                        if self._share(phase, name).keys() - self.journal.done():
                            shard.begin(self._spawn(phase, name, left))
                    elif code is not None:
                        shard.process = None
                        crashed = code < 0 and self._blame(phase, name, f"ended its process with signal {-code}")
                        if (crashed or code == DEVICE_BROKEN) and left > 0:
                            shard.begin(self._spawn(phase, name, left))
                        elif code not in (0, CHECKS_FAILED):
                            troubles.append(f"process {name} ended with status {code}, see round.log")
                running = [name for name, shard in shards.items() if shard.process]
                if running and -left > (0 if cut_by_budget else GRACE):
                    troubles.append(f"cut off after {outcome.seconds:.0f} s")
                    if not cut_by_budget:  # what hung once is not tried again when the round goes on
                        for name in running:
                            self._blame(phase, name, f"did not end within the phase's {seconds:.0f} s")
                    break
        finally:
            for shard in shards.values():
                if shard.process:
                    _kill(shard.process)
        outcome.detail = "; ".join(troubles)

    def _share(self, phase: Phase, shard: str) -> dict[str, Unit]:
        return share(Round(self.out, self.rehearse).units(phase.name), shard)

    def _blame(self, phase: Phase, shard: str, why: str, hung: bool = False) -> bool:
        """Record the unit that a process was at, the first of its share that is not done, as failed; False for none.

        Where units are grouped by plan and it hung, the plan's other units of the phase are not begun at all.
        """
        done, machine = self.journal.done(), this_machine(self.rehearse)
        unit = next((unit for unit in self._share(phase, shard) if unit not in done), None)
        if unit is None:
            return False
        self.journal.append(unit, [], [record(checks.unit_failure(unit, why), machine)])
        for other in Round(self.out, self.rehearse).units(phase.name) if hung and phase.by_plan else ():
            if other not in {*done, unit} and other.split()[0] == unit.split()[0]:
                check = replace(checks.unit_failure(other, f"not begun: {unit} hung"), status="not run")
                self.journal.append(other, [], [record(check, machine)])
        return True

    def _spawn(self, phase: Phase, shard: str, seconds: float) -> subprocess.Popen[bytes]:
        """A process in a session of its own, to be ended as a group with whatever it starts."""
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        if self.rehearse:
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = self.command(phase, shard, seconds)
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=self.log, stderr=self.log, start_new_session=True
        )

    def command(self, phase: Phase, shard: str, seconds: float) -> list[str]:
        """What a process of the phase runs."""
        worker = [sys.executable, "-m", "benchmarks.worker", "--phase", phase.name, "--shard", shard]
        worker += ["--seconds", f"{seconds:.1f}", "--out", str(self.out.resolve())]
        return [*worker, "--rehearse"] if self.rehearse else worker


if __name__ == "__main__":
    sys.exit(main())
