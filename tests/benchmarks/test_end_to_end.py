import csv
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import end_to_end
from benchmarks.curves import PEFT
from benchmarks.models import SIZES

CPU = torch.device("cpu")


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_run_of_both_models_leaves_rows_curves_and_verdicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--device", "cpu", "--size", "rehearsal", "--steps", "4", "--threads", "1", "--out", str(tmp_path)]
    assert end_to_end.main(arguments) == 0
    rows, curves, checks = (_table(tmp_path / f"{name}.csv") for name in ("rows", "curves", "checks"))
    names = ["peft", "peft torch.compile", "lora_kernels"]
    assert [(row["op"], row["implementation"]) for row in rows] == [
        (f"train_{model}", name) for model in ("llama", "bert") for name in names
    ]
    assert {(check["implementation"], check["status"]) for check in checks} == {(name, "ok") for name in names[1:]}
    assert len(curves) == 2 * 5 * 4  # models, contenders with PEFT's twins, steps
    assert float(curves[-1]["loss"]) > 0
    printed = capsys.readouterr().out
    assert "train_llama lora_kernels: " in printed
    assert "tokens/s" in printed
    assert "of PEFT's; loss " in printed


@pytest.mark.parametrize("model", list(SIZES))
def test_a_wrong_layer_is_noticed_by_its_curve(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load = end_to_end.load_adapter

    def one_percent_off(base: nn.Module, folder: str, trainable: bool) -> nn.Module:
        loaded = load(base, folder, trainable=trainable)
        for module in loaded.modules():
            if hasattr(module, "scaling") and hasattr(module, "lora_B"):
                module.scaling *= 1.01
        return loaded

    monkeypatch.setattr(end_to_end, "load_adapter", one_percent_off)
    outcome = end_to_end.train(model, SIZES[model]["rehearsal"], CPU, torch.float32, steps=6, compiled=False)
    assert [check.status for check in outcome.checks] == ["failed"]


def test_all_contenders_begin_with_the_same_loss_and_learn() -> None:
    outcome = end_to_end.train("llama", SIZES["llama"]["rehearsal"], CPU, torch.float32, steps=30, compiled=False)
    first = {point["loss"] for point in outcome.curves if point["step"] == 1}
    assert max(first) - min(first) < 1e-5
    curve = [point["loss"] for point in outcome.curves if point["implementation"] == PEFT]
    assert sum(curve[-5:]) < sum(curve[:5])
    assert outcome.rows[-1].ratio_to_best_rival == pytest.approx(outcome.rows[-1].ms_p50 / outcome.rows[0].ms_p50)
