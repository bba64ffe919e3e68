"""The cases and contenders of benchmarks.run as pytest-benchmark tests, one group a case.

    pytest benchmarks/ --benchmark-only [--shapes llama-3-8b] [--tokens 512] [--benchmark-autosave]

A contender is judged by the correctness checks before it is timed; one that is wrong is a failed test. Times are a
call's from the host's side (on a GPU: queued, run and waited for); benchmarks.run has the GPU's own clock, contenders
in turns and the ratios.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks import checks, overhead
from benchmarks.blocks import rivals_of
from benchmarks.cases import DTYPES, OPS, Case, parse
from benchmarks.measure import plan_label, ready
from benchmarks.rivals import Implementation, our_backends
from benchmarks.rows import this_machine
from lora_kernels import BackendUnavailableError
from lora_kernels.testing import make_problem

DEFAULTS = {  # shapes on a CPU, on a GPU
    "lora_linear": ("bert-base", "llama-3-8b"),
    "lora_linear_stacked": ("bert-base", "llama-3-8b"),
    "lora_mlp": ("smollm2-135m", "llama-3-8b"),
}


def _device(config: pytest.Config) -> torch.device:
    return torch.device(config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu"))


def _cases(config: pytest.Config) -> Iterator[Case]:
    """The subset of DEFAULTS, or every layer and block of what --shapes names."""
    option, cpu = config.getoption, _device(config).type == "cpu"
    dtype = DTYPES[option("--dtype") or ("fp32" if cpu else "bf16")]
    tokens, asked = option("--tokens") or (128 if cpu else 8192), option("--shapes")
    for op in OPS:
        if asked and "," in asked and op != "lora_linear":
            continue
        for p in map(float, option("--dropout").split(",")):
            try:
                cases = parse(asked or DEFAULTS[op][0 if cpu else 1], dtype, p, tokens, option("--rank"), op)
            except ValueError:
                if op == "lora_linear":
                    raise
                continue  # a model without such a block
            yield from cases


def _contenders(case: Case, mode: str, device: torch.device) -> Iterator[Implementation]:
    """Those that can run here: no missing library, no refused plan, no dropout for one that cannot drop."""
    for contender in rivals_of(case, our_backends(device)):
        if contender.missing() is not None or (case.p > 0 and not contender.dropout):
            continue
        try:
            plan_label(contender, case, mode, device)
        except BackendUnavailableError:
            continue
        yield contender


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    device = _device(config)
    if metafunc.function is test_operator:
        asked = [
            pytest.param(mode, case, contender, id=f"{mode}-{case}-{contender.name} {contender.backend}".strip())
            for mode in config.getoption("--modes").split(",")
            for case in _cases(config)
            for contender in _contenders(case, mode, device)
        ]
        metafunc.parametrize(("mode", "case", "contender"), asked)
    elif metafunc.function is test_overhead:
        layers = [each for each in overhead.CONTENDERS if each.missing() is None]
        metafunc.parametrize("mode", overhead.MODES)
        metafunc.parametrize("contender", layers, ids=lambda each: each.name)


@functools.lru_cache(maxsize=1)  # tests of one case follow each other
def _oracle(case: Case, device: torch.device) -> checks.Oracle:
    return checks.Oracle(checks.problem_of(case, device))


@functools.cache
def _machine() -> dict[str, Any]:
    return vars(this_machine())


def _waited_for(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    def run() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def test_operator(benchmark: Any, mode: str, case: Case, contender: Implementation, request: Any) -> None:
    device = _device(request.config)
    oracle = _oracle(case, device)
    if contender.lora:
        for check in checks.judge(case, oracle, contender, backward=mode == "fwd_bwd"):
            assert check.status == "ok", f"{check.what}: {check.message}"
    benchmark.group = f"{mode} {case}"
    benchmark.name = f"{contender.name} {contender.backend}".strip()
    benchmark.extra_info.update(_machine(), plan=plan_label(contender, case, mode, device))
    benchmark(_waited_for(ready(contender, [oracle.problem], mode).call, device))


def test_overhead(benchmark: Any, mode: str, contender: Implementation, request: Any) -> None:
    """One round is overhead.CALLS calls on tensors of overhead.SIZE: divide by it for the time of a call."""
    device = _device(request.config)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    problem = make_problem(*overhead.SIZE, dtype, device, bias=False)
    benchmark.group = f"overhead of {overhead.CALLS} calls, {mode}"
    benchmark.name = contender.name
    benchmark.extra_info.update(_machine())
    call = overhead.repeated(contender.build(problem, None), problem.X.requires_grad_(), problem.dY, mode)
    benchmark(_waited_for(call, device))
