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
from itertools import islice

import torch

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
    faults: Sequence[str] = ()


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
        told = [Row(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
        begun = [row for row in told if not row.kernel and not row.faults]
        rows += [row for row in told if row.kernel or row.faults]
        if done.returncode == 0:
            return rows
        if not begun:
            raise RuntimeError(f"the compile matrix could not start:\n{done.stderr[-2000:]}")
        crash = f"the compiler crashed with {done.returncode}: {' '.join(done.stderr[-300:].split())}"
        rows.append(dataclasses.replace(begun[-1], faults=(crash,)))
        start += jobs * len(begun)


def _compile_cases(archs: Sequence[str], dtypes: Sequence[str], start: int, step: int) -> Iterator[Row]:
    """For each case a bare row as it begins, then one for each kernel it launches and one for what it raises."""
    # This runs in a process of its own; the report itself needs no Triton.
    from lora_kernels.kernels.shipped import shipped_cases
    from lora_kernels.testing.dry_gpu import DryGPU

    def name(dtype: torch.dtype) -> str:
        return str(dtype).removeprefix("torch.")

    cases = ((arch, case) for arch in archs for case in shipped_cases(arch) if not dtypes or name(case.dtype) in dtypes)
    for arch, case in islice(cases, start, None, step):
        begun = Row(kernel="", case=case.label, config=_brief(case.config), dtype=name(case.dtype), arch=arch)
        yield begun
        with DryGPU(CHIPS[arch]) as gpu:
            try:
                case.launch()
            except Exception as error:  # whatever a compiler raises, the case must not ship and the rest is wanted
                reason = " ".join(str(error).split())[:300]
                yield dataclasses.replace(begun, faults=(f"{type(error).__name__}: {reason}",))
        for kernel in gpu.kernels:
            yield dataclasses.replace(
                begun,
                kernel=kernel.name,
                registers=kernel.resources.registers,
                spills=kernel.resources.spills,
                stack=kernel.resources.stack,
                shared=kernel.shared,
                matrix=kernel.matrix_instructions,
                faults=kernel.faults(),
            )


def _brief(config: object) -> str:
    """A configuration's fields in short: M128 N128 K64 GROUP_M8 warps8 stages3."""
    values = dataclasses.asdict(config)  # type: ignore[call-overload]
    return " ".join(f"{name.removeprefix('BLOCK_').removeprefix('num_')}{value}" for name, value in values.items())


if __name__ == "__main__":
    for told in _compile_cases(**json.loads(sys.argv[1])):
        print(json.dumps(dataclasses.asdict(told)), flush=True)
