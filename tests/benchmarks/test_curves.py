import math

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.curves import FACTOR, PEFT, REVERSED, ROTATED, curve_columns, floor, judged, verdict

CASE = Case(8, 8, 8, 2)
PEFTS = [2.0, 1.5, 1.0]
TWIN = [2.0, 1.5 * (1 + 1e-6), 1.0 * (1 - 4e-7)]


def _status(ours: list[float]) -> tuple[str, str]:
    points = list(judged("llama", {PEFT: PEFTS, REVERSED: TWIN, ROTATED: PEFTS, "lora_kernels": ours}, torch.float32))
    check = verdict(CASE, "lora_kernels", points)
    return check.status, check.message


def test_what_drifts_no_further_than_peft_from_itself_agrees() -> None:
    assert _status(PEFTS) == ("ok", "")
    assert _status([2.0, 1.5 * (1 - 1e-6), 1.0 * (1 + 1e-6)])[0] == "ok"


@pytest.mark.parametrize(
    ("ours", "step"),
    [([2.0 * (1 + 1e-5), 1.5, 1.0], 1), ([2.0, 1.5, 1.0 + 1e-4], 3), ([2.0, math.nan, 1.0], 2)],
    ids=["from the first step", "later", "not finite"],
)
def test_what_drifts_further_does_not(ours: list[float], step: int) -> None:
    status, message = _status(ours)
    assert status == "failed"
    assert message.startswith(f"step {step}: relative difference")


def test_the_allowance_never_shrinks_and_begins_at_the_floor() -> None:
    points = list(judged("llama", {PEFT: PEFTS, REVERSED: PEFTS, ROTATED: TWIN}, torch.float32))
    assert points[0]["allowed"] == floor(torch.float32)
    assert points[1]["allowed"] == pytest.approx(FACTOR * 1e-6 + floor(torch.float32))
    assert points[2]["allowed"] == points[1]["allowed"]
    assert floor(torch.float32) == 4 * 2**-24
    assert floor(torch.bfloat16) == 4 * 2**-8
    assert set(points[0]) < set(curve_columns())
