"""What the host spends on a call: a LoRA layer on tensors so small that nothing else is left, beside F.linear.

On a CPU a call's time is almost all Python, dispatch and autograd; on a GPU it is the time to queue the work, with
nothing waited for. A sample is the mean of CALLS calls. Rows are in ms as all rows are; what is printed is in
microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.measure import row
from benchmarks.rivals import ADDMM_CHAIN, FROZEN, PEFT, Implementation, Layer
from benchmarks.roofline import Ceilings
from benchmarks.rows import Record, Row
from benchmarks.timing import Call, HostClock, interleaved
from lora_kernels import LoRALinear
from lora_kernels.testing import Problem, make_problem
from lora_kernels.tuning.measure import spread

CALLS = 50
MODES = ("fwd_no_grad", "fwd", "fwd_bwd")
SIZE = (4, 16, 16, 4)  # M, N, K, r


def _layer(problem: Problem, seed: Tensor | None) -> Layer:
    """LoRALinear as a model holds it, in training mode."""
    (N, K), r = problem.W.shape, problem.A.shape[0]
    linear = torch.nn.Linear(K, N, bias=False, device=problem.X.device, dtype=problem.X.dtype)
    module = LoRALinear.from_linear(linear, r=r, adapter_dtype=problem.A.dtype)
    module.lora_dropout = problem.p
    return Layer(module, (module.lora_A, module.lora_B))


LAYER = Implementation("lora_kernels", _layer)


class QueueClock(HostClock):
    """Wall-clock time of calls that nobody waits for; the device is idle when a round begins."""

    def start_round(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        super().start_round()


def repeated(layer: Layer, X: Tensor, dY: Tensor, mode: str) -> Call:
    """CALLS calls of ``mode`` in one."""
    inputs = [X, *layer.params]

    def fwd_no_grad() -> None:
        with torch.no_grad():
            layer.forward(X)

    def fwd() -> None:
        layer.forward(X)

    def fwd_bwd() -> None:
        torch.autograd.grad(layer.forward(X), inputs, dY)

    call: Callable[[], None] = {"fwd_no_grad": fwd_no_grad, "fwd": fwd, "fwd_bwd": fwd_bwd}[mode]

    def calls() -> None:
        for _ in range(CALLS):
            call()

    return calls


CONTENDERS = (FROZEN, LAYER, PEFT, ADDMM_CHAIN)


def overhead(
    device: torch.device,
    dtype: torch.dtype,
    dropouts: Sequence[float],
    rounds: int,
    contenders: Sequence[Implementation] = CONTENDERS,
) -> list[Row]:
    """Rows "overhead" of F.linear, LoRALinear, PEFT's layer and the addmm chain, by mode and dropout."""
    contenders = [each for each in contenders if each.missing() is None]
    rows = []
    for p in dropouts:
        case = Case(*SIZE, p, dtype)
        problem = make_problem(*SIZE, dtype, device, bias=False, dropout_p=p)
        X = problem.X.requires_grad_()
        for mode in MODES:
            calls = {each.name: repeated(each.build(problem, None), X, problem.dY, mode) for each in contenders}
            taken = interleaved(calls, QueueClock(), rounds)
            times = {name: spread([ms / CALLS for ms in samples]) for name, samples in taken.items()}
            one = times[FROZEN.name].p50
            make = partial(row, case, mode, ceilings=Ceilings({}, 0.0), frozen=one, op="overhead")
            rows += [make(name, "", each, ()) for name, each in times.items()]
    return rows


def table(rows: Sequence[Record]) -> list[str]:
    """Microseconds a call, and how many of them over F.linear."""
    lines = []
    ones: dict[tuple[object, ...], float] = {}
    for each in (each for each in rows if each["op"] == "overhead"):
        key = (each["mode"], each["dropout"])
        one = ones.setdefault(key, each["ms_p50"])  # the frozen layer comes first
        p50, p20, p80 = (1e3 * each[name] for name in ("ms_p50", "ms_p20", "ms_p80"))
        what = f"{each['mode']:11} p{each['dropout']:<3g} {each['implementation']:13}"
        lines.append(f"{what} {p50:7.1f} us ({p20:.1f} to {p80:.1f}), {p50 - 1e3 * one:+.1f} us over F.linear")
    return lines
