import csv
from pathlib import Path

import pytest
import torch

from benchmarks import serving
from benchmarks.measure import Bench
from benchmarks.roofline import Ceilings
from benchmarks.rows import read_rows
from benchmarks.serving_cases import served
from benchmarks.timing import RehearsalClock
from lora_kernels.check.serving import rivals
from lora_kernels.check.serving.rivals import ALL_SLOTS, FROZEN, ours

CPU = torch.device("cpu")
CASE = served(12, (40, 24), 3, "half", "2,5", 4, torch.float32, bias=True)
BENCH = Bench(CPU, RehearsalClock(), lambda: Ceilings({"fp32": 1.0, "bf16": 1.0}, 1.0), rounds=1, warmup=0, copies=2)


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


def test_a_run_writes_rows_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serving, "_cases", lambda *_: [CASE])
    monkeypatch.setattr(serving, "HostClock", RehearsalClock)
    monkeypatch.setattr(serving, "SIDE", {"cpu": 32})
    monkeypatch.setattr(rivals, "triton_missing", lambda device_type: "not here")
    assert serving.main(["--device", "cpu", "--rounds", "1", "--dtype", "fp32", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert rivals.ON_A_CPU in told
    assert "0 checks failed" in told
    rows = read_rows(tmp_path)
    mine = next(row for row in rows if row["implementation"] == "lora_kernels")
    assert (mine["distribution"], mine["sequence"], mine["ranks"], mine["L"]) == ("half", 4, "2-5", 3)
    assert {row["op"] for row in rows} == {"multi_lora_linear", "ceiling"}
    with (tmp_path / "checks.csv").open(newline="") as file:
        assert {row["status"] for row in csv.DictReader(file)} <= {"ok", "not run"}
    with pytest.raises(SystemExit):
        serving.main(["--rounds", "0"])
