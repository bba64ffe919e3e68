"""Whole steps of PEFT's models, accelerated or not: ``python -m benchmarks.accelerate [--model bert|llama] [--curve]``.

One model (random weights, LoRA term as large as the base's), adapted by PEFT; the contenders are its copies, which
share the frozen weights. Forward and backward of a whole step, contenders in turns; what autograd keeps for the
backward is counted; loss, logits and every gradient are judged by the error rule before anything is timed, with dropout
under masks that depend on the input's shape alone. --curve: the demo's model and data, trained by PEFT and accelerated.

OUT gets rows.csv (ratio_to_best_rival is to PEFT; op step_MODEL or step_MODEL_attention), checks.csv, curves.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import DTYPE_NAMES, DTYPES, Case
from benchmarks.checks import check_of, not_run
from benchmarks.counting import operators, saved_mib
from benchmarks.demo_curve import demo_curve
from benchmarks.end_to_end import Outcome, write
from benchmarks.models import SIZES, Batch, Size, batches, build
from benchmarks.rows import Check, Row, this_machine
from benchmarks.timing import Clock, CudaClock, HostClock, extra_peak_mib, interleaved
from lora_kernels.finetune import values
from lora_kernels.tuning.measure import spread

PEFT, OURS, ALONE = "peft", "lora_kernels accelerated", "lora_kernels accelerated, group=False"
ATTENTION = {"bert": ("query", "key", "value"), "llama": ("q_proj", "k_proj", "v_proj", "o_proj")}
TIME, SAVED = 0.93, 0.80  # targets on a CPU: of PEFT's time, and with dropout 0.1 of what it saves
RANK, ALPHA = 16, 32
DRAWS = {torch.float32: 1}  # batches judged together; 16-bit results of one batch are one draw
WHOLE = {  # BERT-base on 8 sentences of 128 tokens; SmolLM2 135M's width and layers on 2 of 256
    "bert": Size(768, 3072, 12, 12, 12, 30522, 8, 128),
    "llama": Size(576, 1536, 30, 9, 3, 49152, 2, 256),
}


@dataclass(frozen=True)
class Setting:
    """What is measured: a model's name and size, LoRA on all linear layers or on the attention's, dropout."""

    model: str
    size: Size
    targets: str
    dropout: float
    dtype: torch.dtype

    @property
    def case(self) -> Case:
        op = f"step_{self.model}" + ("_attention" if self.targets == "attention" else "")
        return Case(self.size.batch_tokens, self.size.inner, self.size.width, RANK, self.dropout, self.dtype, op=op)

    def contenders(self, device: torch.device) -> dict[str, Any]:
        """PEFT's model and accelerated copies, all on the same frozen weights."""
        from peft import LoraConfig, get_peft_model

        from lora_kernels.check.compat.families import fill_adapters
        from lora_kernels.integrations.peft import accelerate

        targets: Any = "all-linear" if self.targets == "all-linear" else list(ATTENTION[self.model])
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=self.dropout, target_modules=targets)
        torch.manual_seed(7)
        theirs: Any = get_peft_model(build(self.model, self.size, device, self.dtype), config)
        fill_adapters(theirs)
        frozen = {id(p): p for p in theirs.parameters() if not p.requires_grad}
        made = {PEFT: theirs}
        for name, group in ((OURS, True), (ALONE, False)):
            made[name] = accelerate(copy.deepcopy(theirs, dict(frozen)), group=group, verbose=False, strict=True)
        return made


def step(model: Any, batch: Batch) -> Any:
    """Forward and backward of the model on a batch; gradients start from nothing."""
    model.zero_grad(set_to_none=True)
    output = model(**batch)
    output.loss.backward()
    return output


def judged(setting: Setting, models: dict[str, Any], given: Sequence[Batch]) -> Iterator[Check]:
    """Every accelerated copy beside PEFT's, with PEFT's model in float64 as the truth."""
    from lora_kernels.check.compat.judge import Answers, errors, fault
    from lora_kernels.check.compat.stage import gradients, one_mask_a_shape

    def answers(model: Any, batch: Batch) -> Answers:
        output = step(model, batch)
        found = gradients(model) | {"output:loss": output.loss.detach().reshape(1)}
        return found | {"output:logits": output.logits.detach()}

    dropout = setting.dropout > 0
    if dropout and given[0]["input_ids"].is_cuda:
        why = "a GPU's kernels draw masks of their own: the operators' checks judge them"
        yield from (not_run(setting.case, name, why, "model") for name in models if name != PEFT)
        return
    with one_mask_a_shape() if dropout else contextlib.nullcontext():
        exact = copy.deepcopy(models[PEFT]).double()
        truth = [answers(exact, batch) for batch in given]
        del exact
        plain = [answers(models[PEFT], batch) for batch in given]
        for name, model in models.items():
            if name == PEFT:
                continue
            step(model, given[0])  # the first call finds which layers read one input
            draws = [
                errors(answers(model, b), p, t, setting.dtype) for b, p, t in zip(given, plain, truth, strict=True)
            ]
            wrong = fault(draws, setting.dtype)
            worst = [max(each[norm] for each in draws[0].values()) for norm in (0, 1)]
            status = "failed" if wrong else "ok"
            yield check_of("model", setting.case, name, "step", status, *worst, message=wrong or "")


def measure_steps(
    setting: Setting, device: torch.device, clock: Clock, rounds: int, rehearse: bool = False
) -> tuple[list[Row], list[Check]]:
    """A row a contender that is right, and the checks."""
    models = setting.contenders(device)
    count = DRAWS.get(setting.dtype, 8)
    given = batches(setting.model, setting.size, count, device)
    checks = list(judged(setting, models, given))
    wrong = {check.implementation for check in checks if check.status == "failed"}
    calls = {name: partial(step, model, given[0]) for name, model in models.items() if name not in wrong}
    times = {name: spread(each) for name, each in interleaved(calls, clock, rounds, 1 if rehearse else 2).items()}
    case = setting.case
    rows = [
        Row(
            case.op, "fwd_bwd", DTYPE_NAMES[case.dtype], "dense", case.M, case.N, case.K, case.r, 1, case.p,
            "" if name == PEFT else "auto", name, *times[name], None, None, None,
            peak_mib=extra_peak_mib(call, device),
            ratio_to_frozen=None,
            ratio_to_best_rival=times[name].p50 / times[PEFT].p50,
            saved_mib=saved_mib(call, models[name].parameters()),
            operators=operators(call),
        )
        for name, call in calls.items()
    ]  # fmt: skip
    return rows, checks


def report(rows: Sequence[Row], checks: Sequence[Check]) -> Iterator[str]:
    """A line a contender, with PEFT's as 1; ours beside the targets."""
    peft = next(row for row in rows if row.implementation == PEFT)
    for row in rows:
        kept = (row.saved_mib or 0.0) / (peft.saved_mib or 1.0)
        line = (
            f"{row.op} p{row.dropout:g} {row.dtype} {row.implementation}: {row.ms_p50:.1f} ms "
            f"({row.ms_p20:.1f} to {row.ms_p80:.1f}), {row.ratio_to_best_rival:.3f} of PEFT's; saved for backward "
            f"{row.saved_mib:.1f} MiB, {kept:.3f} of PEFT's; {row.operators} operators"
        )
        if row.implementation == OURS:
            line += f"; time target {TIME} {'met' if (row.ratio_to_best_rival or 2) <= TIME else 'missed'}"
            if row.dropout:
                line += f", memory target {SAVED} {'met' if kept <= SAVED else 'missed'}"
        yield line
    for check in checks:
        found = f"{check.check} p{check.dropout:g} {check.implementation}: {check.status}"
        if check.max_ratio is not None:
            found += f", error {check.max_ratio:.2f} x PEFT's (rms {check.rms_ratio:.2f})"
        yield f"{found} {check.message}".rstrip()


def settings(options: argparse.Namespace, device: torch.device) -> Iterator[Setting]:
    """Every model, target and dropout asked for."""
    dtype = DTYPES[options.dtype or ("fp32" if device.type == "cpu" else "bf16")]
    for model in WHOLE if options.model == "all" else [options.model]:
        size = SIZES[model]["rehearsal"] if options.size == "rehearsal" else WHOLE[model]
        if options.size == "gpu":
            size = SIZES[model]["gpu"]
        if options.layers:
            size = replace(size, layers=options.layers)
        for targets in options.targets.split(","):
            for dropout in options.dropout:
                yield Setting(model, size, targets, dropout, dtype)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=[*WHOLE, "all"], default="bert")
    parser.add_argument("--size", choices=["rehearsal", "whole", "gpu"], help="default: whole on a CPU, else gpu")
    parser.add_argument("--layers", type=values.count, help="fewer than the model has")
    parser.add_argument("--targets", default="all-linear,attention")
    parser.add_argument("--dropout", type=values.several(values.real(0.0, below=1.0)), default=[0.0, 0.1])
    parser.add_argument("--dtype", choices=list(DTYPES), help="default fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--rounds", type=values.count, default=15)
    parser.add_argument("--threads", type=values.threads, help="PyTorch's threads on a CPU (default: its own choice)")
    parser.add_argument(
        "--curve", type=values.whole(), default=0, metavar="STEPS", help="train the demo's model as well"
    )
    parser.add_argument("--no-steps", action="store_true", help="the curve alone")
    parser.add_argument("--out", type=values.output_folder, default=Path("out/accelerate"))
    options = parser.parse_args(argv)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.threads:
        torch.set_num_threads(options.threads)
    device, machine = torch.device(options.device), this_machine()
    options.size = options.size or ("whole" if device.type == "cpu" else "gpu")
    clock: Clock = HostClock() if device.type == "cpu" else CudaClock(device)
    print(f"{machine.gpu}, torch {machine.torch}, triton {machine.triton}, commit {machine.commit}")
    if device.type == "cpu":
        print(f"Load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")
    outcomes: list[Outcome] = []
    for setting in () if options.no_steps else settings(options, device):
        rows, checks = measure_steps(setting, device, clock, options.rounds)
        outcomes.append(Outcome(rows, checks, []))
        print("\n".join(report(rows, checks)), flush=True)
        write(options.out, outcomes, machine)
    if options.curve:
        outcomes.append(demo_curve(options.curve, device))
        for check in outcomes[-1].checks:
            print(f"curve of the demo, {options.curve} steps, {check.implementation}: {check.status} {check.message}")
        write(options.out, outcomes, machine)
    print(f"rows, checks and curves in {options.out}")
    return 1 if any(check.status == "failed" for outcome in outcomes for check in outcome.checks) else 0


if __name__ == "__main__":
    sys.exit(main())
