import csv

import pytest
import torch

from lora_kernels.check.serving import measure as trial
from lora_kernels.check.serving import rivals
from lora_kernels.check.serving.rivals import FROZEN, ours
from lora_kernels.cli import main
from lora_kernels.cli import serve_bench as command
from lora_kernels.cli.shapes import MODELS, Shape


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Use a model of three small layers, the CPU's implementation, and a fake clock."""
    monkeypatch.setitem(MODELS, "tiny", {Shape(24, 16, True): 2, Shape(16, 24): 1})
    monkeypatch.setattr(rivals, "triton_missing", lambda device_type: "not here")
    monkeypatch.setattr(rivals, "cpp_missing", lambda: "not here, either")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "in_turns", fake_times)


def fake_times(calls, rounds, device, seconds):
    return {name: [2.0 if name == FROZEN.name else 3.0] * rounds for name in calls}


def test_tables_throughput_and_rows(tmp_path, capsys):
    out = tmp_path / "made" / "rows.csv"
    arguments = ["--model", "tiny", "--tokens", "4", "96", "--distribution", "half", "none", "--ranks", "2,5"]
    assert main(["serve-bench", *arguments, "--adapters", "3", "--sequence", "2", "--out", str(out)]) == 0
    output = capsys.readouterr().out
    assert rivals.ON_A_CPU in output
    assert "M4 in 2s N24 K16 L3 r2-5 half float32 x2: decode" in output
    assert "M96 in 2s N16 K24 L3 r2-5 none float32 x1: prefill, 0 adapters in the batch" in output
    assert "lora_kernels            reference  3000.0  3000.0  3000.0     1,333     1.500         1.000" in output
    assert "lora_kernels / peft adapter_names: 1.000 (the frozen layer alone: 0.667)" in output
    whole = output[output.index("all 3 linear layers, 4 tokens in 2s, 3 adapters, half:") :].splitlines()
    assert whole[2].split() == ["frozen", "linear", "6.000", "667", "1.000"]
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(command.COLUMNS)
    assert {(row["M"], row["distribution"]) for row in rows} == {
        ("4", "half"), ("4", "none"), ("96", "half"), ("96", "none"),
    }  # fmt: skip
    mine = next(row for row in rows if row["implementation"] == "lora_kernels")
    assert (mine["plan"], mine["ratio_to_frozen"], mine["L"], mine["ranks"]) == ("reference", "1.5", "3", "2-5")


def test_a_configuration_file_and_swap(tiny_model, capsys):
    given = [
        "--model",
        str(tiny_model / "config.json"),
        "--tokens",
        "2",
        "--ranks",
        "4",
        "--with-swap",
        "--rounds",
        "1",
    ]
    assert main(["serve-bench", *given, "--adapters", "2"]) == 0
    output = capsys.readouterr().out
    assert "M2 N32 K16 L2 r4 uniform float32 x2: decode" in output
    assert "merge and swap" in output


def test_errors_of_this_package_are_shown_and_end_with_one(monkeypatch, capsys):
    right = trial.Oracle.judge
    monkeypatch.setattr(
        trial.Oracle,
        "judge",
        lambda self, contender, Y, dtype: right(self, contender, Y + 1 if contender.ours else Y, dtype),
    )
    assert main(["serve-bench", "--model", "tiny", "--tokens", "3", "--rounds", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  lora_kernels reference: failed: Y: error is") for line in lines)
    assert not any(line.startswith("  lora_kernels            ") for line in lines), "what is wrong gets no time"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--ranks", "2147483647"], "give fewer --tokens, fewer --adapters or smaller --ranks"),
        (["--device", "cuda"], "no GPU here"),
        (["--model", "./no-such-folder"], "there is no such file"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, word, capsys):
    assert main(["serve-bench", "--model", "tiny", *arguments]) == 2
    line = capsys.readouterr().err
    assert line.startswith("lora-kernels serve-bench: ")
    assert word in line
    assert line.count("\n") == 1


def test_on_a_gpu_a_decode_is_a_graph_and_peft_is_called_eagerly(monkeypatch, capsys):
    asked = []

    def measure(case, contenders, device, *, graph=False, rounds, timer):
        asked.append((graph, [each.label for each in contenders]))
        timings = [
            trial.Timing(case, each, "", 1.0, 1.0, 1.0, 1.0, 1.0) for each in contenders if each.graph or not graph
        ]
        return trial.Trial(timings, [])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(command, "measure", measure)
    monkeypatch.setattr(command, "contenders", lambda case, device: [FROZEN, ours(), rivals.PEFT])
    assert main(["serve-bench", "--model", "tiny", "--tokens", "8"]) == 0
    assert asked[:2] == [
        (True, ["frozen linear", "lora_kernels auto", "peft adapter_names"]),
        (False, ["frozen linear", "peft adapter_names"]),
    ]
    output = capsys.readouterr().out
    assert output.startswith("tiny on A GPU")
    assert "bfloat16 x2: decode, 5 adapters in the batch, replays of a CUDA graph, cold weights" in output
    assert "lora_kernels / peft" not in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--distribution", "zipf"], "argument --distribution: distribution 'zipf'; accepted are distinct"),
        (["--ranks", "0"], "argument --ranks: ranks '0'; accepted are 16"),
        (["--ranks", "9999999999"], "argument --ranks: ranks '9999999999'; accepted are ranks up to"),
        (["--tokens", "0"], "argument --tokens: '0' was given"),
        (["--tokens"], "argument --tokens: expected at least one argument"),
        (["--sequence", "-1"], "argument --sequence: '-1' was given"),
        (["--adapters", "999999999999"], "argument --adapters: '999999999999' was given"),
        (["--out", "/dev/null/x.csv"], "argument --out: '/dev/null/x.csv' was given"),
    ],
)
def test_values_are_refused_by_the_parser(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["serve-bench", "--model", "bert-base", *arguments])
    assert stopped.value.code == 2
    assert f"lora-kernels serve-bench: error: {message}" in capsys.readouterr().err
