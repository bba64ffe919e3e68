from dataclasses import replace

import pytest
import torch

from lora_kernels.check.serving import rivals
from lora_kernels.check.serving.cases import ServingCase
from lora_kernels.check.serving.rivals import (
    ALL_SLOTS,
    BMM,
    FROZEN,
    PEFT,
    PEFT_FP32,
    SWAP,
    TWO_LAUNCHES,
    contenders,
    ours,
)
from lora_kernels.testing.multi import multi_truth

CPU = torch.device("cpu")
CASES = [
    ServingCase(12, 40, 24, (2, 5, 8), distribution, sequence, torch.float64, bias)
    for distribution, sequence, bias in (
        ("uniform", 1, True),
        ("half", 4, False),
        ("none", 1, True),
        ("skewed", 5, True),
    )
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_way_gives_the_same(case):
    problem = case.problem()
    truth = multi_truth(problem).Y
    for contender in (*contenders(case, CPU), SWAP):
        if contender is not FROZEN and contender.missing() is None:
            with torch.no_grad():
                torch.testing.assert_close(contender.build(case, problem)(), truth)


def test_who_takes_part_on_a_cpu(monkeypatch):
    monkeypatch.setattr(rivals, "triton_missing", lambda device_type: "not here")
    monkeypatch.setattr(rivals, "cpp_missing", lambda: "no compiler")
    case = replace(CASES[0], dtype=torch.bfloat16)
    taking_part = contenders(case, CPU)
    assert [each.label for each in taking_part if each.ours] == ["lora_kernels reference"]
    monkeypatch.setattr(rivals, "cpp_missing", lambda: None)
    assert [each.backend for each in contenders(case, CPU) if each.ours] == ["auto", "reference"]
    assert {PEFT, PEFT_FP32, BMM} < set(taking_part)
    assert TWO_LAUNCHES not in taking_part
    assert [each.is_rival(torch.bfloat16) for each in (FROZEN, ours(), BMM, ALL_SLOTS, SWAP)] == [
        False, False, True, True, False,
    ]  # fmt: skip
    assert SWAP.is_rival(torch.float32), "only 16 bits round the update away"


def test_a_plan_is_named_with_its_launches(monkeypatch):
    case = ServingCase(16, 64, 64, (8,), dtype=torch.bfloat16)
    assert rivals.plan_label(case, "reference", CPU) == "reference"
    assert rivals.planned_launches(case, "reference", CPU) == 0
    assert rivals.plan_label(case, "triton:eager", CPU) == "eager"
    assert [rivals.planned_launches(case, f"triton:{plan}", CPU) for plan in ("eager", "extend", "decode")] == [3, 2, 1]
    assert rivals.plan_label(case, "triton", CPU).startswith("auto (")
    assert rivals.our_backends(case, CPU)[:2] == ["triton", "triton:eager"]
    many = ServingCase(128, 64, 64, (8,), dtype=torch.bfloat16)
    assert "up to 64" in (rivals.refusal(many, "triton:decode", CPU) or "")
