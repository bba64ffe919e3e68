import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import serving
from benchmarks.measure import Bench
from benchmarks.roofline import Ceilings
from benchmarks.rows import Machine, Record, read_rows, record
from benchmarks.serving_cases import TARGETS, served
from benchmarks.timing import RehearsalClock
from lora_kernels.serving import rivals
from lora_kernels.serving.rivals import ALL_SLOTS, FROZEN, PEFT, ours
from lora_kernels.serving.trial import Timing

CPU = torch.device("cpu")
CASE = served(12, (40, 24), 3, "half", "2,5", 4, torch.float32, bias=True)
MACHINE = Machine("GPU", "1", "2", "3", "4", "5", "6")
BENCH = Bench(CPU, RehearsalClock(), lambda: Ceilings({"fp32": 1.0, "bf16": 1.0}, 1.0), rounds=1, warmup=0, copies=2)


def _timing(case: Any, contender: Any, ms: float, plan: str = "", frozen: float = 1.0) -> Timing:
    return Timing(case, contender, plan, ms, ms, ms, ms / frozen, None)


def _records(mode: str, *timings: Timing) -> list[Record]:
    return [record(serving.row_of(timing, mode, BENCH), MACHINE) for timing in timings]


def test_a_case_gives_rows_and_checks_with_every_column() -> None:
    rows, checks = serving.measured(CASE, "fwd", [FROZEN, ours("reference"), ALL_SLOTS], BENCH)
    assert [(check.implementation, check.status, check.what) for check in checks] == [
        ("lora_kernels reference", "ok", "L3 r2-5 half in 4s"), ("all slots + mask", "ok", "L3 r2-5 half in 4s"),
    ]  # fmt: skip
    assert [(row.implementation, row.plan) for row in rows] == [
        ("frozen linear", ""), ("lora_kernels", "reference"), ("all slots + mask", ""),
    ]  # fmt: skip
    frozen, mine, _ = rows
    assert (mine.L, mine.r, mine.ranks, mine.distribution, mine.sequence) == (3, 5, "2-5", "half", 4)
    assert frozen.tflops == pytest.approx(2 * 12 * 40 * 24 / 1e9)
    assert mine.tflops == pytest.approx(CASE.flop / 1e9)
    assert mine.gbps == pytest.approx(CASE.bytes / 1e6)
    graph, _ = serving.measured(CASE, "fwd_graph", [FROZEN, ours("reference")], BENCH)
    assert [row.ms_p50 for row in graph] == [0.5, 0.5], "one millisecond for two copies"


def test_what_peft_takes_is_told_with_its_floor() -> None:
    rows = _records(
        "fwd", _timing(CASE, FROZEN, 0.3), _timing(CASE, ours("reference"), 0.45, "reference"), _timing(CASE, PEFT, 1.0)
    )
    (line,) = serving.beside_peft(rows)
    assert line == ("/ peft adapter_names, fwd fp32 3x4 tokens 24->40 L3 r2-5 half: 0.450, frozen 0.300 (within: 0.5)")
    slower = _records(
        "fwd", _timing(CASE, FROZEN, 0.6), _timing(CASE, ours("reference"), 0.7, "reference"), _timing(CASE, PEFT, 1.0)
    )
    assert "(above, as the frozen layer: 0.5)" in serving.beside_peft(slower)[0]
    assert len(serving.lines(rows)) == 2
    assert serving.lines([row | {"op": "lora_linear"} for row in rows]) == []


@pytest.mark.parametrize(("ratio", "word"), [(1.02, "aim met"), (1.05, "met"), (1.2, "MISSED")])
def test_targets_are_judged_on_the_planners_choice(ratio: float, word: str) -> None:
    target = TARGETS[1]
    rows = _records(
        target.mode,
        _timing(target.case, FROZEN, 1.0),
        _timing(target.case, ours("triton:eager"), 0.5, "eager"),
        _timing(target.case, ours("triton"), ratio, "auto (decode)"),
    )
    (line,) = [line for line in serving.lines(rows) if line.startswith("target")]
    assert line.endswith(f"{ratio:.3f}, must 1.08, aim 1.030: {word}")
    other = _records("fwd", _timing(replace(target.case, sequence=2), ours("triton"), 1.0, "auto (decode)"))
    assert not [line for line in serving.lines(other) if line.startswith("target")]


def test_a_run_writes_rows_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serving, "_cases", lambda *_: [CASE])
    monkeypatch.setattr(serving, "HostClock", RehearsalClock)
    monkeypatch.setattr(serving, "SIDE", {"cpu": 32})
    monkeypatch.setattr(rivals, "triton_missing", lambda device_type: "not here")
    assert serving.main(["--device", "cpu", "--rounds", "1", "--dtype", "fp32", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "no kernel of ours" in told
    assert "0 checks failed" in told
    rows = read_rows(tmp_path)
    mine = next(row for row in rows if row["implementation"] == "lora_kernels")
    assert (mine["distribution"], mine["sequence"], mine["ranks"], mine["L"]) == ("half", 4, "2-5", 3)
    assert {row["op"] for row in rows} == {"multi_lora_linear", "ceiling"}
    with (tmp_path / "checks.csv").open(newline="") as file:
        assert {row["status"] for row in csv.DictReader(file)} <= {"ok", "not run"}
    with pytest.raises(SystemExit):
        serving.main(["--rounds", "0"])
