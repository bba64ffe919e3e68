import dataclasses

import pytest

from benchmarks.cases import Case
from benchmarks.waterfall import CASE, COLORS, frozen_seconds, note, steps, waterfall
from lora_kernels.kernels.chip import CHIPS
from lora_kernels.planning.choose import OPT_IN, PLANS

CHIP = CHIPS["sm_90"]


def _total(plan: str, case: Case) -> float:
    parts = steps(plan, case, CHIP)
    assert parts is not None
    return sum(part.extra for part in parts) / frozen_seconds(case, CHIP)


@pytest.mark.parametrize("plan", PLANS + OPT_IN)
def test_every_plans_launches_have_a_purpose_or_it_refuses(plan: str) -> None:
    for p in (0.0, 0.1):
        parts = steps(plan, dataclasses.replace(CASE, p=p), CHIP)
        assert parts is None or {part.part for part in parts} <= set(COLORS)


def test_eager_pays_for_two_updates_and_passes_beyond_the_products() -> None:
    parts = steps("eager", CASE, CHIP) or []
    assert [part.kernel for part in parts][:3] == ["XA", "matmul", "addmm_"]
    assert [part.extra for part in parts if part.kernel == "matmul"] == pytest.approx([0, 0], abs=1e-12)
    assert {part.part for part in parts} >= {"adding the update to Y", "adding the update to dX", "dA: a pass over X"}
    assert 0.1 < _total("eager", CASE) < 0.6


def test_one_launch_spares_the_pass_over_x() -> None:
    assert _total("one_launch", CASE) < _total("tma_extend", CASE)
    assert steps("one_launch", dataclasses.replace(CASE, p=0.1), CHIP) is None


def test_a_measured_plan_is_marked() -> None:
    row = {"op": "lora_linear", "mode": "fwd_bwd", "implementation": "lora_kernels", "plan": "eager", "dtype": "bf16",
           "M": 8192, "N": 4096, "K": 4096, "r": 16, "dropout": 0.0, "ratio_to_frozen": 1.234}  # fmt: skip
    for rows, marks in (([], 0), ([row], 1), ([row | {"r": 32}], 0)):
        drawn = waterfall(rows)
        assert drawn is not None
        crosses = [line for axes in drawn[0].axes for line in axes.lines if line.get_label() == "measured"]
        assert len(crosses) == marks
    assert "not a measurement" in note()
