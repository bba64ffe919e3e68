"""`lora-kernels check --compile`: the resources of every shipped kernel on every architecture, and its faults.

Kernels are compiled, not run: no GPU is needed. check/compile/matrix.py makes the rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import groupby

from lora_kernels.check.compile.csrc import csrc_rows, why_none
from lora_kernels.check.compile.matrix import Row, compile_matrix
from lora_kernels.cli.tables import aligned
from lora_kernels.finetune import values
from lora_kernels.kernels.chip import CHIPS
from lora_kernels.planning import cost

QUICK_ARCHS = ("sm_80", "sm_90", "gfx942")
QUICK_DTYPES = ("bfloat16",)
DTYPES = ("bfloat16", "float16", "float32")
MATRIX_UNITS = ("HGMMA", "UTCMMA", "HMMA", "MFMA")
PAGE_ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
MAX_JOBS = 256  # processes; each imports Triton
PAGE_ROWS = 8192  # tokens of the launches on the page: training

TITLES = (
    "kernel", "variant", "dtype", "tiles", "MxNxK", "regs", "spills", "stack B", "shared B", "blocks/SM", "warps/SM",
    "limit", "matrix instr.", "TMA", "cp.async", "MB", "GFLOP", "FLOP/B", "us", "bound", "faults",
)  # fmt: skip


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "check",
        help="compile every shipped kernel configuration for every architecture; needs no GPU",
        description="Compiles every shipped kernel configuration as its launcher would launch it. Prints its GPU "
        "resources and the prediction of the cost model. Exits with 1 if one spills, needs stack or too much shared "
        "memory, lacks the matrix or asynchronous copy instructions it was written for, or does not compile.",
    )
    parser.add_argument("--compile", action="store_true", required=True, help="the compile matrix (the only check)")
    parser.add_argument("--archs", nargs="+", choices=list(CHIPS), metavar="ARCH", help=f"of {', '.join(CHIPS)}")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, metavar="DTYPE", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--kernels", nargs="+", metavar="KERNEL", help="by name, for example extend one_launch")
    parser.add_argument(
        "--quick", action="store_true", help=f"{', '.join(QUICK_DTYPES)} on {', '.join(QUICK_ARCHS)}, unless given"
    )
    parser.add_argument(
        "--jobs", type=values.whole(1, MAX_JOBS), default=os.cpu_count(), help="processes (default: one per core)"
    )
    parser.add_argument("--json", type=values.output_file, metavar="FILE", help="write every row with all its numbers")
    parser.add_argument(
        "--markdown",
        type=values.output_file,
        metavar="FILE",
        help=f"write a page with the {PAGE_ROWS}-token launches in bfloat16",
    )
    parser.set_defaults(run=run_check)


def run_check(args: argparse.Namespace) -> int:
    """Compile, print the table and a summary, write the given files. Return 1 if any row has a fault, else 0."""
    archs = args.archs or (QUICK_ARCHS if args.quick else tuple(CHIPS))
    dtypes = args.dtypes or (QUICK_DTYPES if args.quick else ())
    started = time.monotonic()
    rows = compile_matrix(archs, dtypes, args.kernels or (), args.jobs)
    if reason := why_none():
        print(f"csrc/ is left out: {reason}\n")
    else:
        rows = sorted([*rows, *csrc_rows(archs, dtypes, args.kernels or (), args.jobs)], key=lambda row: row.key)
    for arch, group in groupby(rows, key=lambda row: row.arch):
        print(f"{arch}\n{table(list(group))}\n")
    faulty = [row for row in rows if row.faults]
    print(f"{len(rows)} kernels for {', '.join(archs)} in {time.monotonic() - started:.0f} s: ", end="")
    print(
        f"{len(faulty)} of them must not ship" if faulty else "all may ship" if rows else "there is nothing to compile"
    )
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(page(rows, _command(args)))
    return 1 if faulty or not rows else 0


def _command(args: argparse.Namespace) -> str:
    """Return the command that makes the same rows."""
    chosen = {"--archs": args.archs, "--dtypes": args.dtypes, "--kernels": args.kernels}
    parts = [" ".join((option, *values)) for option, values in chosen.items() if values]
    quick = ["--quick"] if args.quick else []
    return " ".join(["lora-kernels check --compile", *quick, *parts, "--markdown", args.markdown.name])


def table(rows: Sequence[Row]) -> str:
    """Format the rows, one line each, faults last."""
    return aligned([TITLES, *map(cells, rows)])


def cells(row: Row) -> tuple[str, ...]:
    """Format a row's cells, in the order of TITLES."""
    count = row.instructions.get
    known = row.moved > 0
    return (
        row.kernel,
        row.variant,
        row.dtype,
        row.tiles,
        f"{row.M}x{row.N}x{row.K}",
        str(row.registers),
        str(row.spills),
        str(row.stack),
        f"{row.shared:,}",
        str(row.blocks),
        str(row.warps),
        row.limit,
        ", ".join(f"{count(unit)} {unit}" for unit in MATRIX_UNITS if count(unit)) or "-",
        str(count("UTMALDG", 0) + count("UBLKCP", 0) or "-"),
        str(count("LDGSTS") or "-"),
        f"{row.moved / 1e6:.1f}" if known else "-",
        f"{row.flop / 1e9:.2f}" if known else "-",
        f"{row.flop / row.moved:.1f}" if known else "-",
        f"{row.seconds * 1e6:.1f}" if known else "-",
        row.bound or "-",
        "; ".join(row.faults),
    )


def page(rows: Sequence[Row], command: str) -> str:
    """Format the training launches in bfloat16 as a page of docs/, with the command and the compiler version."""
    shown = [row for row in rows if row.arch in PAGE_ARCHS and on_page(row)]
    text = [PAGE_HEAD.format(triton=version("triton"), command=command, rows=len(rows))]
    text.append(PAGE_LEGEND.format(gbps=f"{cost.BANDWIDTH_EFFICIENCY:.2f}", launch=cost.LAUNCH_SECONDS * 1e6))
    for arch, group in groupby(shown, key=lambda row: row.arch):
        chip = CHIPS[arch]
        text.append(f"\n## {arch}\n\n{chip.units} multiprocessors, {chip.tflops} TFLOP/s, {chip.gbps} GB/s.\n\n")
        keep = [i for i, title in enumerate(TITLES) if title not in ("dtype", "faults")]
        lines = [TITLES, ["---"] * len(TITLES), *map(cells, group)]
        text += ["| " + " | ".join(line[i] for i in keep) + " |\n" for line in lines]
    faulty = [row for row in rows if row.faults]
    text.append(f"\n{len(faulty)} kernels must not ship.\n" if faulty else "\nNo kernel has a fault.\n")
    for row in faulty:
        text.append(f"- {row.arch} {row.kernel} {row.variant} {row.dtype} {row.tiles}: {'; '.join(row.faults)}\n")
    return "".join(text)


def on_page(row: Row) -> bool:
    """Check whether the page shows this launch: bfloat16, PAGE_ROWS tokens, N and K multiples of 16."""
    return row.dtype == "bfloat16" and row.M == PAGE_ROWS and row.N % 16 == 0 and row.K % 16 == 0


PAGE_HEAD = """# What the compiler makes of the kernels

Written by `{command}`
with Triton {triton}: compiled for each architecture, **not measured on a GPU**. It compiled {rows} kernels; below are
the bfloat16 launches of a training step, 8192 tokens, adapters in float32.
"""
PAGE_LEGEND = """
tiles: rows x columns x reduction step, w warps, s pipeline stages. regs: registers a thread. blocks/SM, warps/SM: how
many fit one multiprocessor at once, and the resource that limits them. matrix instr.: matrix instructions in the code;
TMA: loads by descriptor (UTMALDG) or bulk copies (UBLKCP); cp.async: asynchronous copies (LDGSTS). MB, GFLOP: of one
launch. us, bound: the cost model's time for it, the larger of FLOP over the rate it assumes for such kernels and bytes
over {gbps} of the bandwidth, plus {launch} us a launch, and which of them that is. "of ...": the second kernel of
another's launch.
"""
