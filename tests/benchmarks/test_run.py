import csv
from pathlib import Path

import pytest

from benchmarks import run


@pytest.mark.slow
def test_a_cpu_run_measures_the_reference_beside_its_rivals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--shapes", "24,48,40,4", "--rounds", "2", "--threads", "1"]
    assert run.main([*arguments, "--out", str(tmp_path)]) == 0
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["gpu"][:5] for row in rows} == {"cpu: "}
    assert {row["dropout"] for row in rows} == {"0.0", "0.1"}
    assert {row["implementation"] for row in rows} >= {"frozen linear", "lora_kernels", "peft", "addmm chain"}
    printed = capsys.readouterr().out
    assert "reference path" in printed
    assert "lora_linear / peft, fwd_bwd M24 N48 K40 r4 p0.1: " in printed


def test_the_hosts_overhead_needs_no_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--op", "overhead", "--device", "cpu", "--dropout", "0", "--rounds", "1", "--threads", "1"]
    assert run.main([*arguments, "--out", str(tmp_path)]) == 0
    assert "us over F.linear" in capsys.readouterr().out
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert {row["op"] for row in csv.DictReader(file)} == {"overhead"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "1,2"], "is no shape"),
        (["--dropout", "1.5"], "probabilities"),
        (["--device", "cpu", "--mode", "fwd_graph"], "CUDA graphs need a GPU"),
        (["--device", "cpu", "--opt-in"], "need a GPU"),
        (["--rounds", "0"], "at least 1"),
        (["--dropout", "some"], "could not convert"),
        (["--op", "lora_mlp", "--shapes", "bert-base"], "no gated MLP"),
    ],
)
def test_wrong_arguments_are_explained(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert message in capsys.readouterr().err
