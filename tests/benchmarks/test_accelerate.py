import csv
from pathlib import Path

import pytest
import torch

from benchmarks import accelerate
from benchmarks.accelerate import ALONE, OURS, PEFT, Setting, measure_steps
from benchmarks.models import SIZES
from benchmarks.timing import RehearsalClock
from lora_kernels.integrations.peft import linear

CPU = torch.device("cpu")


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _setting(dropout: float, model: str = "bert", dtype: torch.dtype = torch.float32) -> Setting:
    return Setting(model, SIZES[model]["rehearsal"], "all-linear", dropout, dtype)


def test_the_command_leaves_rows_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--size", "rehearsal", "--model", "all", "--device", "cpu", "--rounds", "1", "--dropout", "0.1"]
    assert accelerate.main([*arguments, "--out", str(tmp_path)]) == 0
    rows, checks = _table(tmp_path / "rows.csv"), _table(tmp_path / "checks.csv")
    ops = ["step_bert", "step_bert_attention", "step_llama", "step_llama_attention"]
    assert [(row["op"], row["implementation"]) for row in rows] == [(op, n) for op in ops for n in (PEFT, OURS, ALONE)]
    assert {check["status"] for check in checks} == {"ok"}
    assert len(checks) == 2 * len(ops)
    printed = capsys.readouterr().out
    assert "step_llama p0.1 fp32 lora_kernels accelerated: " in printed
    assert "memory target 0.8 met" in printed


def test_less_is_kept_and_less_dispatched_than_by_peft() -> None:
    rows, _ = measure_steps(_setting(0.1), CPU, RehearsalClock(), 1)
    saved = {row.implementation: row.saved_mib or 0.0 for row in rows}
    dispatched = {row.implementation: row.operators or 0 for row in rows}
    assert 0 < saved[OURS] < 0.8 * saved[PEFT]
    assert dispatched[OURS] < dispatched[ALONE] < dispatched[PEFT]
    assert {row.ratio_to_best_rival for row in rows} == {1.0}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_step_gets_no_time(dropout: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    right = linear.operands

    def wrong(*args: object) -> object:
        found = right(*args)  # type: ignore[arg-type]
        return found if isinstance(found, str) else found._replace(scaling=1.1 * found.scaling)

    monkeypatch.setattr(linear, "operands", wrong)
    rows, checks = measure_steps(_setting(dropout, "llama", dtype), CPU, RehearsalClock(), 1)
    assert {check.implementation: check.status for check in checks}[ALONE] == "failed"
    assert ALONE not in [row.implementation for row in rows]


def test_bf16_is_right_over_several_batches() -> None:
    rows, checks = measure_steps(_setting(0.1, "llama", torch.bfloat16), CPU, RehearsalClock(), 1)
    assert [check.status for check in checks] == ["ok", "ok"]
    assert len(rows) == 3
