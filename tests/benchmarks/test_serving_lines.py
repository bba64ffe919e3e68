from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import serving, serving_lines
from benchmarks.measure import Bench
from benchmarks.roofline import Ceilings
from benchmarks.rows import Machine, Record, record
from benchmarks.serving_cases import TARGETS, served
from benchmarks.timing import RehearsalClock
from lora_kernels.check.serving.measure import Timing
from lora_kernels.check.serving.rivals import FROZEN, PEFT, ours

CASE = served(12, (40, 24), 3, "half", "2,5", 4, torch.float32, bias=True)
MACHINE = Machine("GPU", "1", "2", "3", "4", "5", "6")
BENCH = Bench(torch.device("cpu"), RehearsalClock(), lambda: Ceilings({"fp32": 1.0, "bf16": 1.0}, 1.0))


def _timing(case: Any, contender: Any, ms: float, plan: str = "", frozen: float = 1.0) -> Timing:
    return Timing(case, contender, plan, ms, ms, ms, ms / frozen, None)


def _records(mode: str, *timings: Timing) -> list[Record]:
    return [record(serving.row_of(timing, mode, BENCH), MACHINE) for timing in timings]


def test_what_peft_takes_is_told_with_its_floor() -> None:
    rows = _records(
        "fwd", _timing(CASE, FROZEN, 0.3), _timing(CASE, ours("reference"), 0.45, "reference"), _timing(CASE, PEFT, 1.0)
    )
    (line,) = serving_lines.beside_peft(rows)
    assert line == ("/ peft adapter_names, fwd fp32 3x4 tokens 24->40 L3 r2-5 half: 0.450, frozen 0.300 (within: 0.5)")
    slower = _records(
        "fwd", _timing(CASE, FROZEN, 0.6), _timing(CASE, ours("reference"), 0.7, "reference"), _timing(CASE, PEFT, 1.0)
    )
    assert "(above, as the frozen layer: 0.5)" in serving_lines.beside_peft(slower)[0]
    assert len(serving_lines.lines(rows)) == 2
    assert serving_lines.lines([row | {"op": "lora_linear"} for row in rows]) == []


@pytest.mark.parametrize(("ratio", "word"), [(1.02, "aim met"), (1.05, "met"), (1.2, "MISSED")])
def test_targets_are_judged_on_the_planners_choice(ratio: float, word: str) -> None:
    target = TARGETS[1]
    rows = _records(
        target.mode,
        _timing(target.case, FROZEN, 1.0),
        _timing(target.case, ours("triton:eager"), 0.5, "eager"),
        _timing(target.case, ours("triton"), ratio, "auto (decode)"),
    )
    (line,) = [line for line in serving_lines.lines(rows) if line.startswith("target")]
    assert line.endswith(f"{ratio:.3f}, must 1.08, aim 1.030: {word}")
    other = _records("fwd", _timing(replace(target.case, sequence=2), ours("triton"), 1.0, "auto (decode)"))
    assert not [line for line in serving_lines.lines(other) if line.startswith("target")]
