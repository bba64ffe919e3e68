"""Mixed batches as pytest-benchmark tests: ``pytest benchmarks/test_serving.py --benchmark-only [--shapes MODEL]``.

64 sequences with 8 adapters of ranks 8 to 64: by default BERT-base's attention with 1 and 16 tokens each, with
``--shapes MODEL`` every layer of it with one. Each contender is judged before it is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.cases import DTYPES
from benchmarks.rows import this_machine
from benchmarks.serving_cases import BIASED, LAYERS, served
from benchmarks.test_operators import _device, _waited_for
from lora_kernels.check.serving.cases import ServingCase
from lora_kernels.check.serving.measure import judged, oracle_of
from lora_kernels.check.serving.rivals import FROZEN, Contender, contenders, plan_label


def _cases(config: pytest.Config) -> Iterator[ServingCase]:
    option, cpu = config.getoption, _device(config).type == "cpu"
    dtype, asked = DTYPES[option("--dtype") or ("fp32" if cpu else "bf16")], option("--shapes")
    mixed = partial(served, ranks="8-64", dtype=dtype, bias=asked in (None, *BIASED))
    if asked is None:
        for tokens in (1, 16):
            yield mixed(64 * tokens, LAYERS["bert-base"]["attention"], sequence=tokens)
    for layer in LAYERS.get(asked, {}).values():
        yield mixed(64, layer)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = _device(metafunc.config)
    asked = [
        pytest.param(case, contender, id=f"{case}-{contender.label}")
        for case in _cases(metafunc.config)
        for contender in contenders(case, device)
        if contender.missing() is None
    ]
    metafunc.parametrize(("case", "contender"), asked)


def test_mixed_batch(benchmark: Any, case: ServingCase, contender: Contender, request: Any) -> None:
    device = _device(request.config)
    if contender is not FROZEN:
        (judgement,) = judged(case, [contender], device)
        assert judgement.status == "ok", judgement.message
    benchmark.group = str(case)
    benchmark.name = contender.label
    plan = plan_label(case, contender.backend, device) if contender.ours else ""
    benchmark.extra_info.update(vars(this_machine()), plan=plan)
    call = contender.build(case, oracle_of(case, device).problem)
    with torch.no_grad():
        benchmark(_waited_for(call, device))
