"""Many adapters in one batch, beside the rivals: ``python -m benchmarks.serving [--threads 1] [--out out/serving]``.

On a CPU BERT-base's layers with 64 sequences of 1, 16 and 128 tokens, in fp32 and bf16, beside PEFT's layer called with
adapter_names; on a GPU the decode and prefill tables. Each contender is judged first and timed in turns with the
others by the code of lora_kernels.check.serving, which `lora-kernels serve-bench` also runs. docs/serving_bench.md.
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

from benchmarks.cases import DTYPE_NAMES, DTYPES
from benchmarks.measure import Bench, Found
from benchmarks.roofline import Work, ceiling_rows, measure_ceilings
from benchmarks.rows import Check, Journal, Row, record, this_machine
from benchmarks.run import SIDE
from benchmarks.serving_cases import DECODE, PREFILL, cpu_cases, other_mixes
from benchmarks.serving_lines import OP, lines
from benchmarks.timing import MIB, Clock, CudaClock, HostClock, interleaved
from lora_kernels.check.serving.cases import ServingCase
from lora_kernels.check.serving.measure import Judgement, Timing, measure
from lora_kernels.check.serving.rivals import ON_A_CPU, Contender, contenders
from lora_kernels.finetune import values


def what_of(case: ServingCase) -> str:
    """What the columns of a check do not say of a case."""
    return f"L{case.L} r{case.ranks_shown} {case.distribution} in {case.sequence}s"


def check_of(
    case: ServingCase, name: str, status: str, message: str = "", check: str = "rule", ratios: tuple = (None, None)
) -> Check:
    """A Check of a serving case."""
    return Check(
        f"{check} {OP}", DTYPE_NAMES[case.dtype], case.M, case.N, case.K, max(case.ranks), 0.0, name, what_of(case),
        status, *ratios, message,
    )  # fmt: skip


def checks_of(case: ServingCase, judgements: Sequence[Judgement]) -> list[Check]:
    """One each."""
    return [
        check_of(
            case, each.contender.label, each.status, each.message[:300], ratios=(each.max_ratio, each.rms_ratio)
        )
        for each in judgements
    ]  # fmt: skip


def row_of(timing: Timing, mode: str, bench: Bench) -> Row:
    """A timing as a result row; ``r`` is the widest rank."""
    case, lora = timing.case, timing.contender.lora
    frozen = 2 * case.M * case.N * case.K, case.dtype.itemsize * (case.N * case.K + case.M * (case.N + case.K))
    work = Work(case.flop, case.bytes) if lora else Work(*frozen)
    bound = bench.ceilings().milliseconds(work, case.dtype)
    return Row(
        OP, mode, DTYPE_NAMES[case.dtype], "dense", case.M, case.N, case.K, max(case.ranks), case.L, 0.0, timing.plan,
        timing.contender.name, timing.ms_p50, timing.ms_p20, timing.ms_p80,
        tflops=work.flop / timing.ms_p50 / 1e9,
        gbps=work.bytes / timing.ms_p50 / 1e6,
        pct_of_bound=100 * bound / timing.ms_p50,
        peak_mib=None,
        ratio_to_frozen=timing.ratio_to_frozen,
        ratio_to_best_rival=timing.ratio_to_best_rival,
        ranks=case.ranks_shown, distribution=case.distribution, sequence=case.sequence,
    )  # fmt: skip


def measured(case: ServingCase, mode: str, taking_part: Sequence[Contender], bench: Bench) -> Found:
    """Rows of ``mode``, "fwd" or "fwd_graph", for all that are right, and the checks."""

    def timer(calls: dict[str, object], rounds: int) -> dict[str, list[float]]:
        return interleaved(calls, bench.clock, rounds, bench.warmup)  # type: ignore[arg-type]

    trial = measure(
        case, taking_part, bench.device, graph=mode.endswith("_graph"), rounds=bench.rounds, timer=timer,  # type: ignore[arg-type]
        copies=bench.copies,
    )  # fmt: skip
    return [row_of(timing, mode, bench) for timing in trial.timings], checks_of(case, trial.judgements)


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    clock: Clock = CudaClock(device) if on_gpu else HostClock()
    dtypes = [DTYPES[name] for name in options.dtype]
    copied = (1024 if on_gpu else 64) * MIB
    ceilings = functools.cache(partial(measure_ceilings, clock, device, tuple(dtypes), SIDE[device.type], copied))
    bench, machine = Bench(device, clock, ceilings, rounds=options.rounds), this_machine()
    print(f"{machine.gpu}, torch {machine.torch}, triton {machine.triton}, commit {machine.commit}")
    if not on_gpu:
        print(ON_A_CPU)
        print(f"Load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")
    options.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(options.out)
    journal.path.unlink(missing_ok=True)
    failed = 0
    for case in _cases(options.tokens, dtypes, on_gpu):
        for mode in ("fwd", "fwd_graph") if on_gpu and case.phase == "decode" else ("fwd",):
            rows, checks = measured(case, mode, contenders(case, device), bench)
            failed += sum(check.status == "failed" for check in checks)
            told = [record(row, machine) for row in rows]
            journal.append(f"{mode} {case}", told, [record(check, machine) for check in checks])
            journal.write_tables()
            print("\n".join(lines(told)), flush=True)
    journal.append("ceilings", [record(row, machine) for row in ceiling_rows(bench.ceilings(), SIDE[device.type])], [])
    journal.write_tables()
    print(f"rows in {options.out / 'rows.csv'}; {failed} checks failed")
    return 1 if failed else 0


def _cases(tokens: Sequence[int], dtypes: Sequence[torch.dtype], on_gpu: bool) -> list[ServingCase]:
    if on_gpu:
        return [*DECODE, *PREFILL]
    return [case for dtype in dtypes for case in (*cpu_cases(dtype, tokens), *other_mixes(dtype))]


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description="Time mixed batches.")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"], help="on a CPU")
    parser.add_argument(
        "--tokens", nargs="+", type=values.count, default=[1, 16, 128], help="of each of 64 sequences, on a CPU"
    )
    parser.add_argument(
        "--rounds", type=values.count, default=15, help="timed calls of each contender and case (default 15)"
    )
    parser.add_argument("--threads", type=values.threads, help="PyTorch's threads on a CPU (default: its own choice)")
    parser.add_argument("--out", type=values.output_folder, default=Path("out/serving"), help="folder, overwritten")
    options = parser.parse_args(argv)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device here")
    if min(*options.tokens, options.rounds, 1) < 1:
        parser.error("--tokens and --rounds are at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
