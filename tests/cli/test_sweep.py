import argparse
import csv
import json
import shlex

import pytest

from lora_kernels.cli import main, train
from lora_kernels.cli.sweep import first_of, settings_of
from lora_kernels.finetune.sweep import sweep as module
from lora_kernels.finetune.sweep.sweep import Axis
from lora_kernels.finetune.tasks import Classification


@pytest.fixture
def options(tiny_model, tiny_data, tmp_path):
    text = f"sweep --model {tiny_model} --data {tiny_data} --batch-size 32 --quiet --warmup 0 --out {tmp_path}/out"
    return shlex.split(f"{text} --budget 1000 --r 2 4 --lr 1e-3:1e-2 --threads 1")


def rows(out):
    with (out / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def trained(command, out):
    """Run a command in another folder; return its validation accuracy and adapter."""
    words = shlex.split(command)
    words[words.index("--out") + 1] = str(out)
    assert main(words[1:]) == 0
    figures = json.loads((out / "metrics.json").read_text())
    return figures["training"]["epochs"][-1]["val_accuracy"], figures["parameters"]["trainable"]


@pytest.mark.slow
def test_the_best_command_and_any_other_repeat_the_numbers(options, tmp_path, capsys):
    more = "--trials 4 --repeats 1 --baselines --full-lr 0.01 --head-lr 0.1 --loraplus 4 --dropout 0.1 --alpha 2r 8"
    assert main([*options, *more.split()]) == 0
    shown, out = capsys.readouterr().out, tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"best.sh", "sweep.csv", "sweep.db", "sweep.png", "sweep.svg"}
    table = rows(out)
    assert [row["kind"] for row in table] == ["LoRA"] * 4 + ["full", "head only", "LoRA, repeated"]
    assert table[0]["r"] == "2"  # the usual 16 is not in the space
    best = max((row for row in table[:4] if row["state"] == "complete"), key=lambda row: float(row["value"]))
    figures = trained((out / "best.sh").read_text(), tmp_path / "best")
    assert figures == (float(best["value"]), int(best["trainable"]))
    other = table[-1]
    assert other["seed"] == "1"
    assert trained(other["command"], tmp_path / "other") == (float(other["value"]), int(other["trainable"]))
    assert "(seed 0), " in shown
    assert "standard error of an accuracy measured on 32 rows" in shown
    assert "the test data has not been looked at" in shown
    assert "test accuracy" not in shown
    assert shown.splitlines()[-1].endswith((out / "best.sh").read_text().strip())


@pytest.mark.slow
def test_resumed_and_overwritten(options, tmp_path, monkeypatch, capsys):
    options += ["--repeats", "0", "--targets", "q,v", "key", "--init", "default", "rslora"]
    assert main([*options, "--trials", "3"]) == 0
    whole = rows(tmp_path / "out")
    assert main([*options, "--trials", "3"]) == 2
    assert "--resume it, or --overwrite it" in capsys.readouterr().err
    run, calls = module.run_trial, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(module, "run_trial", interrupted)
    assert main([*options, "--trials", "3", "--overwrite"]) == 130
    assert main([*options, "--trials", "3", "--resume"]) == 0
    for one, other in zip(rows(tmp_path / "out"), whole, strict=True):
        assert {**one, "seconds": "", "wall": ""} == {**other, "seconds": "", "wall": ""}
    for row in whole:
        assert f"--targets {'query,value' if row['targets'] == 'q,v' else 'key'} " in row["command"]
    assert main([*options, "--trials", "3", "--resume", "--epochs", "2"]) == 2
    assert "other settings: epochs differ" in capsys.readouterr().err


def test_parameters_as_train_takes_them():
    base, sets = argparse.Namespace(rslora=False, lr=1.0, epochs=3), {"q,v": "query,value"}
    usual = {"r": 4, "alpha": "2r", "targets": "q,v", "init": "pissa", "lr": 0.01, "loraplus": 1.0}
    options = vars(settings_of(base, sets, usual, 7))
    assert options == {
        "r": 4, "alpha": 8, "targets": "query,value", "init": "pissa", "lr": 0.01, "loraplus": None, "rslora": False,
        "epochs": 3, "seed": 7,
    }  # fmt: skip
    other = settings_of(base, sets, usual | {"alpha": "0.5", "init": "rslora", "targets": "key", "loraplus": 4.0}, 0)
    assert (other.alpha, other.init, other.rslora, other.targets, other.loraplus) == (0.5, "default", True, "key", 4.0)
    assert settings_of(base, sets, {"r": 3, "alpha": "r"}, 0).alpha == 3
    assert base.lr == 1.0
    parser = argparse.ArgumentParser()
    train.add_arguments(parser, Classification)
    trained = vars(parser.parse_args([])) | {"loraplus": 4.0}
    assert train.recipe_of(argparse.Namespace(**trained), Classification, None).loraplus == 4.0


def test_the_first_trial_is_what_train_does_by_default():
    space = {"r": Axis((8, 16)), "alpha": Axis(("1r", "2r")), "dropout": Axis((0.1, 0.0)), "lr": Axis(low=1e-4, high=1)}
    space |= {"targets": Axis(("q,v", "all-linear")), "init": Axis(("pissa", "default")), "loraplus": Axis((1.0,))}
    usual = argparse.ArgumentParser()
    train.add_arguments(usual, Classification)
    defaults = usual.parse_args([])
    first = vars(settings_of(defaults, {}, first_of(space), defaults.seed))
    assert first == vars(defaults)
    elsewhere = first_of(space | {"r": Axis((2, 4)), "lr": Axis(low=1e-5, high=1e-3 / 10)})
    assert (elsewhere["r"], elsewhere["lr"]) == (2, pytest.approx(10**-4.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--targets nothing", "no layer of BertForSequenceClassification matches"),
        ("--lr 1e-3 1e-4:1e-2", "give either a single LOW:HIGH, or learning rates"),
        ("--alpha 3e38r", "lora_alpha = "),
    ],
)
def test_mistakes_are_one_clear_line(options, capsys, change, message):
    assert main([*options, "--trials", "1", "--repeats", "0", *change.split()]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--alpha 2x", "argument --alpha: '2x' was given; accepted is a finite number, or a multiple of r such as 2r"),
        ("--alpha nanr", "argument --alpha: 'nanr' was given"),
        (
            "--lr 1e-2:1e-3",
            "argument --lr/--learning-rate: '1e-2:1e-3' was given; accepted is a number above 0, or LOW",
        ),
        ("--lr 1:2:3", "argument --lr/--learning-rate: '1:2:3' was given"),
        ("--lr 0:1", "argument --lr/--learning-rate: '0:1' was given"),
        ("--lr 1e-4:inf", "argument --lr/--learning-rate: '1e-4:inf' was given"),
        ("--lr fast", "argument --lr/--learning-rate: 'fast' was given"),
        ("--r 4 0", "argument --r: '0' was given"),
        ("--dropout 2", "argument --dropout: '2' was given"),
        ("--budget 0", "argument --budget: '0' was given"),
        ("--budget nan", "argument --budget: 'nan' was given"),
        ("--seed 4294967296", "argument --seed: '4294967296' was given"),
        ("--threads 100000", "argument --threads: '100000' was given"),
        ("--monitor f1", "argument --monitor: 'f1' was given"),
        ("--data missing.csv", "argument --data: 'missing.csv' was given"),
        ("--resume --overwrite", "argument --overwrite: not allowed with argument --resume"),
    ],
)
def test_values_are_refused_by_the_parser(options, capsys, change, message):
    with pytest.raises(SystemExit) as stopped:
        main([*options, *change.split()])
    assert stopped.value.code == 2
    assert f"lora-kernels sweep: error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"no database" * 100, b"SQLite format 3\0" + bytes(2000)])
def test_a_damaged_study_is_one_sentence(options, tmp_path, capsys, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.db").write_bytes(content)
    assert main([*options, "--trials", "1", "--resume"]) == 2
    shown = capsys.readouterr().err
    assert "sweep.db cannot be used (DatabaseError: file is not a database)" in shown
    assert shown.count("\n") == 1
