"""One process of a GPU round: the units of one phase, or of a share of it, that the journal lacks.

    python -m benchmarks.worker --phase NAME --out DIR [--shard 0/4] [--seconds S] [--rehearse]

Begins no unit once its seconds are over. Exit status: 0, CHECKS_FAILED, or DEVICE_BROKEN where an error left the GPU
context unusable (what is left then needs a fresh process).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import checks
from benchmarks.measure import DeviceBroken, Found
from benchmarks.phases import Round, Unit
from benchmarks.rows import Journal, record, this_machine
from benchmarks.schedule import PHASES
from benchmarks.tools import PROFILED_PHASE, SANITIZED_PHASE, SERVING_PHASE

WATCHED = (SANITIZED_PHASE, PROFILED_PHASE, SERVING_PHASE)  # what the tools start
DEVICE_BROKEN = 3
CHECKS_FAILED = 4


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker", description="One process of a GPU round.")
    parser.add_argument("--phase", required=True, choices=[*(phase.name for phase in PHASES), *WATCHED])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shard", default="0/1", help="this process and their number")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--rehearse", action="store_true", help="expects TRITON_INTERPRET=1")
    options = parser.parse_args(argv)
    if options.rehearse:
        from lora_kernels.testing import interpreter

        torch.set_num_threads(1)
        interpreter.install()
    this, journal, machine = Round(options.out, options.rehearse), Journal(options.out), this_machine(options.rehearse)
    bench, done, failed = this.bench(), journal.done(), 0
    for name, unit in share(this.units(options.phase), options.shard).items():
        if name in done:
            continue
        if time.monotonic() - started > options.seconds:
            print(f"{name}: no time left", flush=True)
            continue
        begun = time.monotonic()
        broken = False
        try:
            with emulated(options.rehearse):
                found: Found = unit(bench)
        except Exception as error:  # the journal says what happened; the next unit may be well
            found, broken = ([], [checks.unit_failure(name, error)]), isinstance(error, DeviceBroken)
        rows, made = found
        points = [point | asdict(machine) for point in bench.curves]
        bench.curves.clear()
        journal.append(name, [record(row, machine) for row in rows], [record(check, machine) for check in made], points)
        print(f"{name}: {len(rows)} rows, {len(made)} checks, {time.monotonic() - begun:.1f} s", flush=True)
        for check in made:
            if check.status == "failed":
                failed += 1
                print(f"  FAILED {check.check} {check.implementation} {check.what}: {check.message}", flush=True)
        if broken:
            return DEVICE_BROKEN
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return CHECKS_FAILED if failed else 0


@contextlib.contextmanager
def emulated(rehearse: bool) -> Iterator[None]:
    """In a rehearsal Gluon's kernels run in their emulator, as Triton's do in the interpreter."""
    if not rehearse:
        yield
        return
    from lora_kernels.testing.emulator import emulate

    with emulate():
        yield


def share(units: dict[str, Unit], shard: str) -> dict[str, Unit]:
    """The units of process i of n for "i/n", in their order."""
    number, of = (int(part) for part in shard.split("/"))
    return dict(list(units.items())[number::of])


if __name__ == "__main__":
    sys.exit(main())
