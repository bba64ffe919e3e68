"""``lora-kernels serve-bench``: latency and throughput of a model's linear layers in mixed batches, beside rivals."""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from lora_kernels.check.serving.cases import ServingCase, check_distribution, ranks_from
from lora_kernels.check.serving.measure import Timing, Trial, in_turns, measure
from lora_kernels.check.serving.rivals import FROZEN, ON_A_CPU, PEFT, PEFT_FP32, SWAP, contenders
from lora_kernels.cli.shapes import DTYPES, MODEL_HELP, Shape, shapes_from
from lora_kernels.cli.tables import aligned
from lora_kernels.config import MAX_RANK
from lora_kernels.errors import ConfigError
from lora_kernels.finetune import values
from lora_kernels.testing.multi import DISTRIBUTIONS

MAX_ROWS, MAX_ADAPTERS = 1 << 24, 1 << 16
CASE_SECONDS = 20.0  # most seconds of a case
COLUMNS = (
    "model", "N", "K", "layers", "M", "sequence", "L", "ranks", "distribution", "dtype", "implementation", "plan",
    "ms_p50", "ms_p20", "ms_p80", "tokens_per_s", "ratio_to_frozen", "ratio_to_best_rival", "device", "torch",
)  # fmt: skip
HEAD = ("implementation", "plan", "us p50", "p20", "p80", "tokens/s", "x frozen", "x best rival")


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("serve-bench", help="time a model's layers under batches of many adapters")
    add = parser.add_argument
    add("--model", type=values.model, default="bert-base", metavar="MODEL",
        help=f"{MODEL_HELP} (default: %(default)s)")  # fmt: skip
    add("--tokens", type=values.whole(1, MAX_ROWS), nargs="+", default=[1, 16, 64],
        help="rows of a batch (default: 1 16 64)")  # fmt: skip
    add("--sequence", type=values.whole(0, MAX_ROWS), default=0, metavar="ROWS",
        help="rows of a sequence, which share an adapter (default: 1 up to 64 tokens, above that 128)")  # fmt: skip
    add("--adapters", type=values.whole(1, MAX_ADAPTERS), nargs="+", default=[8], metavar="L",
        help="adapters loaded (default: 8)")  # fmt: skip
    add("--distribution", type=values.checked(_distributions), nargs="+", default=["uniform"], metavar="NAME",
        help=f"how rows use adapters: {', '.join(DISTRIBUTIONS)}, or all (default: uniform)")  # fmt: skip
    add("--ranks", type=values.checked(_ranks), default="8-64",
        help="16 for all, 8,16,64 in turn, or 8-64 mixed (default: %(default)s)")  # fmt: skip
    add("--dtype", choices=DTYPES, help="of weights and adapters (default: bf16 on a GPU, fp32 on a CPU)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--rounds", type=values.count, default=25, help="timed calls of each contender (default: %(default)s)")
    add("--with-swap", action="store_true", help="also time merging each adapter of a batch into W in turn; slow")
    add("--out", type=values.output_file, metavar="CSV", help="write the rows of all tables")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print each case. Return 1 if this package failed the error rule in any."""
    device = _device(arguments.device)
    cases = list(_cases(arguments, device))
    print(f"{arguments.model} on {_machine(device)}, torch {torch.__version__}")
    if device.type == "cpu":
        print(ON_A_CPU)
    rows: list[dict[str, object]] = []
    totals: dict[tuple[object, ...], dict[str, float]] = defaultdict(dict)
    failed = 0
    for shape, layers, case in cases:
        graph = device.type == "cuda" and case.phase == "decode"
        trial = _measured(case, device, graph, arguments)
        failed += sum(each.status == "failed" and each.contender.ours for each in trial.judgements)
        print("\n".join(["", *_table(case, layers, graph, trial)]), flush=True)
        for timing in trial.timings:
            rows.append(_row(arguments.model, shape, layers, timing, device))
            sums = totals[case.M, case.sequence, case.L, case.distribution]
            sums[_name(timing)] = sums.get(_name(timing), 0.0) + layers * timing.ms_p50
    every = sum(shapes_from(arguments.model).values())
    print("\n".join(["", *_whole(every, totals)]))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        print(f"rows: {arguments.out}")
    return 1 if failed else 0


def _cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[tuple[Shape, int, ServingCase]]:
    named = DISTRIBUTIONS if "all" in arguments.distribution else arguments.distribution
    distributions = [check_distribution(name) for name in dict.fromkeys(named)]
    dtype = DTYPES[arguments.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    batches = list(itertools.product(arguments.tokens, arguments.adapters, distributions))
    for shape, layers in shapes_from(arguments.model).items():
        for tokens, L, distribution in batches:
            sequence = min(tokens, arguments.sequence or (1 if tokens <= 64 else 128))
            ranks = ranks_from(arguments.ranks, L)
            case = ServingCase(tokens, *shape[:2], ranks, distribution, sequence, dtype, shape.bias)
            _check_memory(case, device)
            yield shape, layers, case


def _check_memory(case: ServingCase, device: torch.device) -> None:
    """Raise ConfigError for operands larger than the machine's memory, for which the system would kill the process."""
    if device.type == "cuda":
        return  # torch raises an error there
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    pool = case.dtype.itemsize * sum(case.ranks) * (case.N + case.K)
    if (needed := pool + case.dtype.itemsize * (case.M * (case.N + case.K) + case.N * case.K)) > memory:
        raise ConfigError(
            f"{case.M} tokens and {case.L} adapters of rank {case.ranks_shown} take {needed / 2**30:.0f} GiB in a "
            f"layer, and this machine has {memory / 2**30:.0f} GiB: give fewer --tokens, fewer "
            "--adapters or smaller --ranks"
        )


def _measured(case: ServingCase, device: torch.device, graph: bool, arguments: argparse.Namespace) -> Trial:
    timer = functools.partial(in_turns, device=device, seconds=CASE_SECONDS)
    taking_part = [each for each in contenders(case, device) if arguments.with_swap or each is not SWAP]
    trial = measure(case, taking_part, device, graph=graph, rounds=arguments.rounds, timer=timer)
    if not graph or all(each.graph for each in taking_part):
        return trial
    # A graph cannot capture PEFT. It is called eagerly and compared with the frozen layer of the same eager run.
    eager = [FROZEN, *(each for each in taking_part if not each.graph)]
    others = measure(case, eager, device, rounds=arguments.rounds, timer=timer).timings[1:]
    return Trial([*trial.timings, *(replace(each, ratio_to_best_rival=None) for each in others)], trial.judgements)


def _ranks(text: str) -> None:
    given = ranks_from(text, 8) if len(text) < 1000 else (MAX_RANK + 1,)
    if max(given) > MAX_RANK:
        raise ConfigError(f"ranks {text[:60]!r}; accepted are ranks up to {MAX_RANK}")


def _distributions(text: str) -> None:
    if text != "all":
        check_distribution(text)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU here; leave it out, or take --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    load = os.getloadavg()[0]
    busy = f" (load {load:.1f}: others compute, too)" if load > 1.5 else ""
    return f"a CPU, {torch.get_num_threads()} threads{busy}"


def _name(timing: Timing) -> str:
    return f"{timing.contender.name} {timing.plan.partition(' ')[0]}".strip()


def _table(case: ServingCase, layers: int, graph: bool, trial: Trial) -> list[str]:
    how = "replays of a CUDA graph, cold weights" if graph else "single calls"
    lines = [f"{case} x{layers}: {case.phase}, {len(case.rows_of)} adapters in the batch, {how}"]
    if case.phase == "decode":
        lines.append(f"  reading W and the batch's adapters once is {case.floor:.3f} of reading W")
    rows = [HEAD]
    for timing in sorted(trial.timings, key=lambda timing: timing.ms_p50):
        times = [f"{1e3 * ms:.1f}" for ms in (timing.ms_p50, timing.ms_p20, timing.ms_p80)]
        ratios = [f"{x:.3f}" if x else "" for x in (timing.ratio_to_frozen, timing.ratio_to_best_rival)]
        rows.append((timing.contender.name, timing.plan, *times, f"{timing.tokens_per_s:,.0f}", *ratios))  # type: ignore[arg-type]
    lines += _indented(rows)
    lines += [] if graph else _beside_peft(trial)  # PEFT is called eagerly
    failed = [each for each in trial.judgements if each.status != "ok"]
    return [*lines, *(f"  {each.contender.label}: {each.status}: {each.message}" for each in failed)]


def _beside_peft(trial: Trial) -> list[str]:
    """Compare with PEFT's time: this package, and the frozen layer, which is the lower bound for adapters."""
    # In reverse, so that of several plans of this package the first one, the planner's choice, is kept.
    times = {timing.contender.name: timing.ms_p50 for timing in reversed(trial.timings)}
    lines = []
    for peft in (PEFT.name, PEFT_FP32.name):
        if peft in times and "lora_kernels" in times:
            ratio, floor = (times[name] / times[peft] for name in ("lora_kernels", FROZEN.name))
            lines.append(f"  lora_kernels / {peft}: {ratio:.3f} (the frozen layer alone: {floor:.3f})")
    return lines


def _whole(layers: int, totals: dict[tuple[object, ...], dict[str, float]]) -> list[str]:
    """Sum the times of all linear layers of the model."""
    lines = []
    for (tokens, sequence, L, distribution), sums in totals.items():
        lines.append(f"all {layers} linear layers, {tokens} tokens in {sequence}s, {L} adapters, {distribution}:")
        rows: list[Sequence[str]] = [("implementation", "ms a pass", "tokens/s", "x frozen")]
        for name, ms in sorted(sums.items(), key=lambda item: item[1]):
            rows.append((name, f"{ms:.3f}", f"{1e3 * int(str(tokens)) / ms:,.0f}", f"{ms / sums[FROZEN.name]:.3f}"))
        lines += _indented(rows)
    return lines


def _indented(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align words left and numbers right, indented by two spaces."""
    words = sum(name in ("implementation", "plan") for name in rows[0])
    return [f"  {line}" for line in aligned(rows, range(words)).splitlines()]


def _row(model: str, shape: Shape, layers: int, timing: Timing, device: torch.device) -> dict[str, object]:
    case = timing.case
    values = (
        model, shape.N, shape.K, layers, case.M, case.sequence, case.L, case.ranks_shown, case.distribution,
        str(case.dtype).removeprefix("torch."), timing.contender.name, timing.plan, timing.ms_p50, timing.ms_p20,
        timing.ms_p80, timing.tokens_per_s, timing.ratio_to_frozen, timing.ratio_to_best_rival, _machine(device),
        torch.__version__,
    )  # fmt: skip
    shown = [float(f"{value:.6g}") if isinstance(value, float) else value for value in values]
    return dict(zip(COLUMNS, shown, strict=True))
