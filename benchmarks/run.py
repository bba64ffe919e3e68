"""Measure one operator here: ``python -m benchmarks.run --op lora_linear --mode fwd_bwd``.

On a GPU every plan of ours and every rival; on a CPU the reference path, in float32, beside PEFT and the other rivals.
Each contender is checked first and timed in turns with the others; rows go to OUT/rows.csv, checks to OUT/checks.csv.
``--op overhead`` is what the host spends on a call, whatever the shape. docs/benchmarks.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.blocks import rivals_of
from benchmarks.cases import DTYPES, MODELS, OPS, Case, parse
from benchmarks.measure import Bench, measure
from benchmarks.overhead import overhead, table
from benchmarks.rivals import OPT_IN_BACKENDS, our_backends
from benchmarks.roofline import ceiling_rows, measure_ceilings
from benchmarks.rows import Check, Journal, Record, record, this_machine
from benchmarks.summary import summary
from benchmarks.timing import MIB, Clock, CudaClock, HostClock
from lora_kernels.finetune import values

MODES = ("fwd", "fwd_bwd", "fwd_graph", "fwd_bwd_graph")
SIDE = {"cpu": 1024, "cuda": 8192}  # of the squares whose product is the ceiling
DEFAULTS = {  # shapes on a CPU, on a GPU
    "lora_linear": ("bert-base", "llama-3-8b"),
    "lora_linear_stacked": ("bert-base", "llama-3-8b"),
    "lora_mlp": ("smollm2-135m", "llama-3-8b"),
    "overhead": ("", ""),
}


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    bench, machine = _bench(device, options), this_machine()
    print(f"{machine.gpu}, torch {machine.torch}, triton {machine.triton}, commit {machine.commit}")
    if device.type == "cpu":
        load = os.getloadavg()[0]
        print("On a CPU lora_kernels runs its reference path: PyTorch's own operators, no kernel of ours.")
        print(f"Load average {load:.1f} on {os.cpu_count()} CPUs" + (": others compute, too" if load > 1 else ""))
    options.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(options.out)
    journal.path.unlink(missing_ok=True)
    checks: list[Check] = []
    if options.op == "overhead":
        rows = overhead(device, DTYPES[options.dtype], options.dropouts, options.rounds)
        journal.append("overhead", [record(row, machine) for row in rows], [])
        journal.write_tables()
        print("\n".join([*table(journal.rows()), f"rows in {options.out / 'rows.csv'}"]))
        return 0
    backends = our_backends(device) + (OPT_IN_BACKENDS if options.opt_in else ())
    for case in options.cases:
        rows, made = measure(case, options.mode, rivals_of(case, backends), bench)
        checks += made
        journal.append(str(case), [record(row, machine) for row in rows], [record(check, machine) for check in made])
        journal.write_tables()
        print(f"{options.mode} {case}: {len(rows)} rows", flush=True)
    made_here = ceiling_rows(bench.ceilings(), SIDE[device.type])
    journal.append("ceilings", [record(row, machine) for row in made_here], [])
    journal.write_tables()
    print(summary(journal.rows(), journal.checks()))
    print("\n".join(_beside_peft(journal.rows())))
    print(f"rows in {options.out / 'rows.csv'}")
    return 1 if any(check.status == "failed" for check in checks) else 0


def _beside_peft(rows: Sequence[Record]) -> list[str]:
    """The ratio that matters to someone who has PEFT now: our time over PEFT's, case by case."""
    lines = []
    shape = ("op", "mode", "dtype", "M", "N", "K", "r", "dropout")
    peft = {tuple(row[name] for name in shape): row for row in rows if row["implementation"] == "peft"}
    for row in rows:
        other = peft.get(tuple(row[name] for name in shape))
        if row["implementation"] == "lora_kernels" and row["plan"].startswith(("auto", "reference")) and other:
            lines.append(
                f"{row['op']} / peft, {row['mode']} M{row['M']} N{row['N']} K{row['K']} r{row['r']} "
                f"p{row['dropout']:g}: {row['ms_p50']:.3f} / {other['ms_p50']:.3f} ms = "
                f"{row['ms_p50'] / other['ms_p50']:.3f}"
            )
    return lines


def _bench(device: torch.device, options: argparse.Namespace) -> Bench:
    clock: Clock = CudaClock(device) if device.type == "cuda" else HostClock()
    copied = 1024 * MIB if device.type == "cuda" else 64 * MIB
    ceilings = partial(measure_ceilings, clock, device, (DTYPES[options.dtype],), SIDE[device.type], copied)
    return Bench(device, clock, functools.cache(ceilings), rounds=options.rounds)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Time a layer beside its rivals.")
    parser.add_argument("--op", choices=[*OPS, "overhead"], default="lora_linear")
    parser.add_argument("--mode", choices=MODES, default="fwd_bwd")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--shapes", help=f"M,N,K,r;M,N,K,r;... or one of {', '.join(MODELS)} (default: DEFAULTS)")
    parser.add_argument(
        "--tokens", type=values.count, help="rows of a model's layers (default 512 on a CPU, 8192 on a GPU)"
    )
    parser.add_argument("--r", type=values.rank, default=16, help="rank of a model's layers (default 16)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--dropout", default="0,0.1", help="probabilities (default 0,0.1)")
    parser.add_argument(
        "--rounds", type=values.count, default=15, help="timed calls of each contender and case (default 15)"
    )
    parser.add_argument("--opt-in", action="store_true", help="on a GPU: the plans that run only where named, too")
    parser.add_argument("--threads", type=values.threads, help="PyTorch's threads on a CPU (default: its own choice)")
    parser.add_argument(
        "--out", type=values.output_folder, default=Path("out/bench"), help="folder, overwritten (default out/bench)"
    )
    options = parser.parse_args(argv)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device here")
    if options.opt_in and options.device == "cpu":
        parser.error("--opt-in: those plans need a GPU")
    if options.mode.endswith("_graph") and options.device == "cpu":
        parser.error(f"--mode {options.mode}: CUDA graphs need a GPU")
    cpu = options.device == "cpu"
    options.dtype = options.dtype or ("fp32" if cpu else "bf16")
    options.shapes = options.shapes or DEFAULTS[options.op][0 if cpu else 1]
    tokens = options.tokens or (512 if cpu else 8192)
    try:
        options.dropouts = [float(p) for p in options.dropout.split(",")]
        options.cases = _cases(options, tokens)
    except ValueError as error:
        parser.error(str(error))
    return options


def _cases(options: argparse.Namespace, tokens: int) -> list[Case]:
    if not all(0 <= p < 1 for p in options.dropouts) or min(tokens, options.r, options.rounds) < 1:
        raise ValueError("--dropout takes probabilities from 0 to below 1; --tokens, --r and --rounds at least 1")
    if options.op == "overhead":
        return []
    dtype = DTYPES[options.dtype]
    return [case for p in options.dropouts for case in parse(options.shapes, dtype, p, tokens, options.r, options.op)]


if __name__ == "__main__":
    sys.exit(main())
