import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch

from lora_kernels.cli import main
from lora_kernels.cli.train import names_or_pattern
from lora_kernels.finetune.train.trainer import Trainer


@pytest.fixture
def options(tiny_model, tiny_data):
    text = f"train --model {tiny_model} --data {tiny_data} --batch-size 8 --quiet --warmup 0 --lr 0.003 --r 4"
    return shlex.split(text)


def result(out):
    """Return what interruptions must not change: the adapter, and figures without times and paths."""
    figures = json.loads((out / "metrics.json").read_text())
    training = {name: figures["training"][name] for name in ("epochs", "steps", "stopped_early", "tokens")}
    return (out / "adapter" / "adapter_model.safetensors").read_bytes(), figures["test"], training


def test_trains_saves_and_reports(options, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*options, "--epochs", "8", "--out", str(out), "--beside-peft", "--no-checkpoints"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "256 train, 32 validation, 32 test sentences; classes: down, up",
        "parameters: ",
        "test accuracy ",
        "true | predicted",
        '"I love programming" -> ',
        "adapter on disk: ",
        "differ by at most 0.0e+00",
        "merged into the weights: 100.00 %",
        "memory, gradients and AdamW's state: ",
        "this run, this machine",
        "to reproduce: lora-kernels train ",
    ):
        assert part in shown
    assert {path.name for path in out.iterdir()} == {"adapter", "metrics.json", "training.png", "reproduce.sh"}
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((out / "metrics.json").read_text())
    assert figures["test"]["accuracy"] > 0.8
    assert figures["beside_peft"]["ratio"] > 0
    assert sum(map(sum, figures["test"]["confusion_matrix"])) == 32


@pytest.mark.slow
def test_the_reproducing_command_reproduces(options, tmp_path, capsys):
    assert main([*options, "--dropout", "0.1", "--out", str(tmp_path / "a")]) == 0
    command = shlex.split((tmp_path / "a" / "reproduce.sh").read_text())
    command[command.index("--out") + 1] = str(tmp_path / "b")
    assert main(command[1:]) == 0
    assert result(tmp_path / "a") == result(tmp_path / "b")


def test_interrupted_and_resumed_ends_the_same(options, tmp_path, monkeypatch, capsys):
    options += ["--epochs", "3", "--dropout", "0.1", "--accumulate", "2", "--checkpoint-every", "3", "--patience", "3"]
    assert main([*options, "--out", str(tmp_path / "whole")]) == 0
    step, calls = Trainer._step, []

    def interrupted(self, run, group):
        calls.append(1)
        if len(calls) in (5, 29):
            raise KeyboardInterrupt
        return step(self, run, group)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    parts = [*options, "--out", str(tmp_path / "parts")]
    assert main(parts) == 130
    assert main(parts) == 2
    assert "earlier run: resume it, or delete them" in capsys.readouterr().err
    assert main([*parts, "--resume"]) == 130
    assert main([*parts, "--resume"]) == 0
    assert result(tmp_path / "parts") == result(tmp_path / "whole")
    assert main([*parts, "--resume", "--lr", "0.02"]) == 2
    assert "lr (then 0.003, now 0.02)" in capsys.readouterr().err


def test_overwrite_starts_again(options, tmp_path, capsys):
    options += ["--out", str(tmp_path)]
    assert main(options) == 0
    first = result(tmp_path)
    assert main([*options, "--overwrite", "--seed", "1"]) == 0
    assert main([*options, "--overwrite"]) == 0
    assert result(tmp_path) == first


def test_bf16_and_other_options_run(options, tmp_path, capsys):
    more = "--bf16 --init pissa --rslora --targets query,value --exclude .*layer.1.* --schedule linear --warmup 3"
    assert main([*options, *shlex.split(more), "--backend", "reference", "--out", str(tmp_path)]) == 0
    settings = json.loads((tmp_path / "metrics.json").read_text())["settings"]
    assert settings["lora"]["target_modules"] == ["query", "value"]
    assert settings["lora"]["init_lora_weights"] == "pissa"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--model ./missing", "model './missing': there is no such folder"),
        ("--targets nothing", "no layer of BertForSequenceClassification matches"),
        ("--text-column words", "no column 'words'"),
        ("--resume --no-checkpoints", "--resume needs checkpoints"),
        ("--lr 1e30 --clip-norm 0", "lower the learning rate"),
    ],
)
def test_mistakes_are_one_clear_line(options, tmp_path, capsys, change, message):
    assert main([*options, "--out", str(tmp_path / "out"), *shlex.split(change)]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.startswith("lora-kernels train: ")
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--data missing.csv", "argument --data: 'missing.csv' was given; accepted is movies, or a file that exists"),
        (
            "--device cuda:99",
            "argument --device: 'cuda:99' was given; accepted is auto, cpu, or a GPU that torch finds",
        ),
        ("--device meta", "argument --device: 'meta' was given"),
        ("--backend fast", "backend 'fast' is unknown"),
        ("--out /dev/null/out", "argument --out: '/dev/null/out' was given; accepted is a place that can be written"),
        ("--r 0", "argument --r: '0' was given; accepted is a whole number of at least 1 and at most 2147483647"),
        ("--epochs 0", "argument --epochs: '0' was given; accepted is a whole number of at least 1"),
        ("--lr 0", "argument --lr: '0' was given; accepted is a number above 0"),
        ("--lr nan", "argument --lr: 'nan' was given; accepted is a number above 0"),
        ("--alpha inf", "argument --alpha: 'inf' was given"),
        ("--warmup inf", "argument --warmup: 'inf' was given"),
        ("--timeout 1e300", "argument --timeout: '1e300' was given"),
        ("--batch-size 0", "argument --batch-size: '0' was given"),
        ("--monitor f1", "argument --monitor: 'f1' was given; accepted is one of loss, accuracy"),
        ("--held-out 0.7", "argument --held-out: '0.7' was given; accepted is a number above 0 and below 0.5"),
        ("--threads -1", "argument --threads: '-1' was given; accepted is a whole number of at least 0 and at most"),
        ("--threads 100000", "argument --threads: '100000' was given; accepted is a whole number of at least 0"),
        ("--seed 99999999999999999999", "argument --seed: '99999999999999999999' was given"),
        ("--split-seed -1", "argument --split-seed: '-1' was given"),
        ("--resume --overwrite", "argument --overwrite: not allowed with argument --resume"),
        ("--r=--", "argument --r: '--' was given, which is not a value"),
    ],
)
def test_values_are_refused_by_the_parser(options, tmp_path, capsys, change, message):
    with pytest.raises(SystemExit) as stopped:
        main([*options, "--out", str(tmp_path / "out"), *shlex.split(change)])
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert (
        f"lora-kernels train: error: {message}" in shown
        or f"lora-kernels: error: {message}" in shown
        or ("--backend" in change and message in shown)
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["--task poetry", "--speed 3", "--schedule square"])
def test_unknown_options_are_refused_by_the_parser(options, capsys, change):
    with pytest.raises(SystemExit) as stopped:
        main([*options, *shlex.split(change)])
    assert stopped.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_names_or_pattern():
    assert names_or_pattern("q_proj,v_proj") == ["q_proj", "v_proj"]
    assert names_or_pattern("query") == ["query"]
    assert names_or_pattern("all-linear") == "all-linear"
    assert names_or_pattern(r".*\.(query|key)") == r".*\.(query|key)"
    assert names_or_pattern(None) is None


@pytest.mark.slow
def test_kill_9_and_resume_ends_the_same(options, tmp_path):
    """Kill the command ten times, each time later in its run."""
    options += ["--epochs", "20", "--dropout", "0.1", "--checkpoint-every", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(name):
        command = [sys.executable, "-m", "lora_kernels.cli", *options, "--resume", "--out", str(tmp_path / name)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    assert start("whole").wait(300) == 0
    killed = 0
    for _ in range(10):
        process = start("parts")
        deadline = time.monotonic() + 900
        before = set((tmp_path / "parts" / "checkpoints").glob("step-*"))
        while process.poll() is None and time.monotonic() < deadline:
            if set((tmp_path / "parts" / "checkpoints").glob("step-*")) - before:
                break  # it has progressed since the last kill
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed == 10
    assert start("parts").wait(300) == 0
    assert result(tmp_path / "parts") == result(tmp_path / "whole")


def test_threads_are_set(options, tmp_path, capsys):
    assert main([*options, "--threads", "1", "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == 1
    assert "--threads 1" in (tmp_path / "reproduce.sh").read_text()
