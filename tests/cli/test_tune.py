import json

import pytest
import torch

from lora_kernels.cli import main
from lora_kernels.cli import tune as command
from lora_kernels.planning import tuned
from lora_kernels.tuning import tune as tuner


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch, tmp_path):
    monkeypatch.setattr(tuner, "candidates", lambda q, chip: [("eager", None), ("shrink_extend", None)])
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_one_clear_line(capsys):
    assert main(["tune", "--shapes-from", "bert-base"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("lora-kernels tune: tune measures on a GPU, and torch finds none here")
    assert "--rehearse" in line


def test_the_rehearsal(tiny_model, tmp_path, capsys):
    pytest.importorskip("triton")
    out = tmp_path / "table.json"
    arguments = ["tune", "--shapes-from", str(tiny_model), "--rehearse", "--tokens", "64", "--dropout", "0"]
    assert main([*arguments, "--ops", "fwd", "--out", str(out)]) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert lines[0].split() == [
        "direction", "M", "N", "K", "r", "dropout", "plan", "us", "eager", "us", "ratio", "candidates"
    ]  # fmt: skip
    assert {tuple(line.split()[:6]) for line in lines[1:3]} == {
        ("fwd", "33", N, "64", "8", "no") for N in ("80", "88")
    }  # fmt: skip
    assert lines[-2].startswith("a rehearsal: these times mean nothing")
    assert lines[-1] == f"table: {out}"
    assert "tune: 100%" in output.err
    assert len(tuned.loads(out.read_text(), "rehearsal", rehearsal=True)) == 2
    assert json.loads(out.read_text())["rehearsal"] is True


def test_what_the_budget_left_and_what_failed_is_shown(capsys, monkeypatch):
    assert main(["tune", "--shapes-from", "llama-3-8b", "--rehearse", "--budget", "0", "--quiet"]) == 0
    output = capsys.readouterr()
    assert "problems were not reached; the same command goes on with them" in output.out
    assert output.err == ""
    monkeypatch.setattr(tuner, "candidates", lambda q, chip: [("eager", None), ("no_such_plan", None)])
    monkeypatch.setattr(
        tuner.TuningRun, "call", lambda self, plan, tiles, made=tuner.TuningRun.call: _or_raise(self, plan, made)
    )
    arguments = ["--tokens", "8", "--ops", "bwd", "--dropout", "0", "--quiet", "--rehearse"]
    assert main(["tune", "--shapes-from", "bert-base", *arguments]) == 0
    assert "no_such_plan: 2 left out: ValueError: no plan" in capsys.readouterr().out


def _or_raise(trial, plan, made):
    def fail():
        raise ValueError("no plan")

    return made(trial, plan, None) if plan == "eager" else fail


@pytest.mark.parametrize(
    "wrong",
    [
        ["--tokens", "0"],
        ["--tokens", "a"],
        ["--dropout", "1"],
        ["--dropout", ""],
        ["--ops", "forward"],
        ["--dtype", "x"],
        ["--r", "0"],
        ["--budget", "nan"],
        ["--dropout", "nan"],
        ["--out", "/dev/null"],
    ],
)
def test_mistyped_options(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["tune", "--shapes-from", "bert-base", *wrong])
    assert stopped.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_the_interpreter_gets_a_process_of_its_own(monkeypatch):
    """When Triton is already imported without it."""
    started = []

    def run(words, env):
        started.append((words, env["TRITON_INTERPRET"]))
        return type("Done", (), {"returncode": 3})

    monkeypatch.setattr(command, "triton_missing", lambda device: "it compiles" if device == "cpu" else None)
    monkeypatch.setattr(command.subprocess, "run", run)
    assert main(["tune", "--shapes-from", "bert-base", "--rehearse", "--budget", "9", "--tokens", "64,128"]) == 3
    ((words, interpreted),) = started
    assert interpreted == "1"
    assert words[1:4] == ["-m", "lora_kernels.cli", "tune"]
    for word in ("--shapes-from=bert-base", "--tokens=64,128", "--dropout=0.0,0.1", "--budget=9.0", "--rehearse"):
        assert word in words
    assert not any(word.startswith("--out") for word in words)
