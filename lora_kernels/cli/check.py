"""`lora-kernels check --compile`: every shipped kernel configuration, compiled for every architecture, without a GPU.

The cases come from kernels/shipped.py, the compiling and judging is done by testing/dry_gpu.py. Cases are dealt out to
processes of their own: Triton must not run its interpreter there, and a compiler that crashes takes one case with it,
not the report.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lora_kernels.kernels.chip import CHIPS

QUICK_ARCHS = ("sm_80", "sm_90", "gfx942")
QUICK_DTYPES = ("bfloat16",)


@dataclasses.dataclass(frozen=True)
class Row:
    """One compiled kernel, or a case that failed to compile: then the numbers are 0 and `faults` says why.

    registers a thread; spills, matrix: instructions in the code; stack in bytes a thread, shared in bytes a block.
    """

    kernel: str
    case: str
    config: str
    dtype: str
    arch: str
    registers: int = 0
    spills: int = 0
    stack: int = 0
    shared: int = 0
    matrix: int = 0
    faults: tuple[str, ...] = ()


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the `check` command; its namespace carries `run`, the function to call with it."""
    parser = subparsers.add_parser(
        "check",
        help="compile every shipped kernel configuration for every architecture; needs no GPU",
        description="Compiles every shipped kernel configuration as its launcher would launch it and prints what it "
        "takes of the GPU. Exits with 1 where one spills, needs stack or too much shared memory, misses the matrix "
        "units, or doesn't compile.",
    )
    parser.add_argument("--compile", action="store_true", required=True, help="the compile matrix; the only check yet")
    parser.add_argument("--archs", nargs="+", choices=list(CHIPS), metavar="ARCH", help=f"of {', '.join(CHIPS)}")
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float16", "float32"], metavar="DTYPE")
    parser.add_argument(
        "--quick", action="store_true", help=f"{', '.join(QUICK_DTYPES)} on {', '.join(QUICK_ARCHS)}, unless named"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.set_defaults(run=run_check)


def run_check(args: argparse.Namespace) -> int:
    """Compiles, prints the table and a summary; 1 where any row has a fault, 0 otherwise."""
    archs = args.archs or (QUICK_ARCHS if args.quick else tuple(CHIPS))
    dtypes = args.dtypes or (QUICK_DTYPES if args.quick else ())
    started = time.monotonic()
    rows = compile_matrix(archs, dtypes, args.jobs)
    print(table(rows))
    red = [row for row in rows if row.faults]
    print(f"\n{len(rows)} kernels for {', '.join(archs)} in {time.monotonic() - started:.0f} s: ", end="")
    print(f"{len(red)} of them must not ship" if red else "all may ship")
    return 1 if red or not rows else 0


def compile_matrix(archs: Sequence[str], dtypes: Sequence[str] = (), jobs: int | None = None) -> list[Row]:
    """The rows of every shipped case of `archs` and `dtypes` (all by default), sorted, from `jobs` processes."""
    jobs = jobs or os.cpu_count() or 1
    with ThreadPoolExecutor(jobs) as pool:
        shares = pool.map(lambda job: _compile_share(archs, dtypes, job, jobs), range(jobs))
        rows = {(row.arch, row.case, row.dtype, row.config, row.kernel): row for share in shares for row in share}
    return [rows[key] for key in sorted(rows)]


def table(rows: Sequence[Row]) -> str:
    """The rows as text, one line each, faults last."""
    titles = [field.name for field in dataclasses.fields(Row)]
    lines = [titles, *([*map(str, dataclasses.astuple(row)[:-1]), "; ".join(row.faults)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _compile_share(archs: Sequence[str], dtypes: Sequence[str], job: int, jobs: int) -> list[Row]:
    """Every `jobs`-th case from `job` on, in one process; after a compiler's crash, in another from the next case."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    rows: list[Row] = []
    start = job
    while True:
        task = json.dumps({"archs": list(archs), "dtypes": list(dtypes), "start": start, "step": jobs})
        done = subprocess.run([sys.executable, "-m", __name__, task], env=environment, capture_output=True, text=True)
        announced: dict[str, Any] = {}
        for message in map(json.loads, done.stdout.splitlines()):
            if "case_index" in message:
                start = message.pop("case_index") + jobs
                announced = message
            else:
                rows.append(Row(**{**message, "faults": tuple(message["faults"])}))
        if done.returncode == 0:
            return rows
        if not announced:
            raise RuntimeError(f"the compile matrix could not start:\n{done.stderr[-2000:]}")
        rows.append(Row(**announced, faults=(f"the compiler crashed with {done.returncode}: {done.stderr[-200:]}",)))


def _compile_cases(archs: Sequence[str], dtypes: Sequence[str], start: int, step: int) -> Iterator[dict[str, Any]]:
    """Announces each case, then yields a row for each kernel it launches and for what it raises; JSON-ready."""
    # This runs in a process of its own; the report itself needs no Triton.
    from lora_kernels.kernels.shipped import shipped_cases
    from lora_kernels.testing.dry_gpu import DryGPU

    cases = [(arch, case) for arch in archs for case in shipped_cases(arch)]
    cases = [(arch, case) for arch, case in cases if not dtypes or str(case.dtype).removeprefix("torch.") in dtypes]
    for index, (arch, case) in list(enumerate(cases))[start::step]:
        what = {"kernel": "", "case": case.label, "config": _brief(case.config), "arch": arch}
        what["dtype"] = str(case.dtype).removeprefix("torch.")
        yield {"case_index": index, **what}
        with DryGPU(CHIPS[arch]) as gpu:
            try:
                case.launch()
            except Exception as error:  # whatever a compiler raises, the case must not ship and the rest is wanted
                yield {**what, "faults": [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"]}
        for kernel in gpu.kernels:
            yield {
                **what,
                "kernel": kernel.name,
                "registers": kernel.resources.registers,
                "spills": kernel.resources.spills,
                "stack": kernel.resources.stack,
                "shared": kernel.shared,
                "matrix": kernel.matrix_instructions,
                "faults": kernel.faults(),
            }


def _brief(config: object) -> str:
    """A configuration's fields in short: M128 N128 K64 GROUP_M8 warps8 stages3."""
    values = dataclasses.asdict(config)  # type: ignore[call-overload]
    return " ".join(f"{name.removeprefix('BLOCK_').removeprefix('num_')}{value}" for name, value in values.items())


if __name__ == "__main__":
    for message in _compile_cases(**json.loads(sys.argv[1])):
        print(json.dumps(message), flush=True)
