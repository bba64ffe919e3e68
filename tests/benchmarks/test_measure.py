import dataclasses

import pytest
import torch

from benchmarks import measure as measuring
from benchmarks.cases import Case
from benchmarks.measure import Bench, DeviceBroken, measure, plan_label, recorded
from benchmarks.rivals import ADDMM_CHAIN, FROZEN, MERGE, PEFT, Implementation, ours
from benchmarks.roofline import Ceilings
from benchmarks.rows import Check
from benchmarks.timing import HostClock

BENCH = Bench(torch.device("cpu"), HostClock(), lambda: Ceilings({"fp32": 0.1, "bf16": 0.1}, 10.0), rounds=3, copies=2)
CASE = Case(16, 48, 40, 4, dtype=torch.float32)


@pytest.mark.parametrize("mode", ["fwd", "fwd_bwd", "fwd_bwd_graph"])
def test_rows_of_a_case(mode: str) -> None:
    rows, found = measure(CASE, mode, [FROZEN, ours("reference"), ADDMM_CHAIN, MERGE], BENCH)
    assert [row.implementation for row in rows] == ["frozen linear", "lora_kernels", "addmm chain", "in-flight merge"]
    assert {check.status for check in found} == {"ok"}
    frozen, mine, *others = rows
    best = min(row.ms_p50 for row in others)
    assert frozen.ratio_to_frozen == 1
    assert mine.ratio_to_frozen == pytest.approx(mine.ms_p50 / frozen.ms_p50)
    assert mine.ratio_to_best_rival == pytest.approx(mine.ms_p50 / best)
    assert mine.plan == "reference"
    assert all(row.ms_p20 <= row.ms_p50 <= row.ms_p80 for row in rows)
    assert all(row.mode == mode and row.tflops > 0 and row.gbps > 0 and row.pct_of_bound > 0 for row in rows)


def test_a_contender_that_is_wrong_or_breaks_or_is_absent_gets_no_row() -> None:
    def broken(*_: object) -> None:
        raise ValueError("broken\nat line two")

    wrong = dataclasses.replace(FROZEN, name="wrong", lora=True)
    breaks = Implementation("breaks", broken)  # type: ignore[arg-type]
    absent = dataclasses.replace(PEFT, needs="no_such_library")
    rows, found = measure(CASE, "fwd", [FROZEN, wrong, breaks, absent], BENCH)
    assert [row.implementation for row in rows] == ["frozen linear"]
    assert [(check.implementation, check.status) for check in found] == [
        ("wrong", "failed"),
        ("breaks", "failed"),
        ("peft", "not run"),
    ]
    assert found[1].message == "ValueError: broken"


def test_one_that_cannot_drop_is_left_out_with_dropout() -> None:
    rows, _ = measure(dataclasses.replace(CASE, p=0.5), "fwd_bwd", [FROZEN, MERGE, ADDMM_CHAIN], BENCH)
    assert [row.implementation for row in rows] == ["frozen linear", "addmm chain"]


def test_without_a_frozen_layer_there_is_no_ratio() -> None:
    ((row,), _) = measure(CASE, "fwd", [ours("reference")], BENCH)
    assert row.ratio_to_frozen is None
    assert row.ratio_to_best_rival is None


def test_the_plan_that_ran_is_named(device: str) -> None:
    case, where = Case(8192, 4096, 4096, 16), torch.device(device)
    assert plan_label(FROZEN, case, "fwd", where) == ""
    assert plan_label(ours("reference"), case, "fwd", where) == "reference"
    assert plan_label(ours("triton:eager"), case, "fwd_bwd", where) == "eager"
    assert plan_label(ours("triton"), case, "fwd", where).startswith("auto (")
    assert plan_label(ours("triton:one_pass"), case, "fwd_bwd", where).startswith("one_pass (one_pass, ")


def test_a_lost_device_ends_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    found: list[Check] = []
    monkeypatch.setattr(measuring.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measuring.torch.cuda, "synchronize", lost)
    with pytest.raises(DeviceBroken, match="illegal memory access"), recorded(CASE, "x", found):
        raise ValueError("first sign of it")
    assert found[0].message == "ValueError: first sign of it"
