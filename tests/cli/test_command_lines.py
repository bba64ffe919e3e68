"""Generated invalid command lines: every option of every command, with values that few or no options accept."""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys

import pytest

from lora_kernels.cli import advise, check, compat, demo, doctor, explain, main, merge, serve_bench, sweep, train, tune

RUNS = {
    doctor: "run", demo: "run", train: "run_command", sweep: "run", explain: "run", advise: "run", tune: "run",
    merge: "run", serve_bench: "run", check: "run_check", compat: "run",
}  # fmt: skip
NEEDED = {
    "advise": ["bert-base"], "tune": ["--shapes-from", "bert-base"], "check": ["--compile"],
    "merge": ["--adapter", ".", "--model", "m", "--out", "new"],
}  # fmt: skip
NUMBERS = {
    "train": "--timeout --threads --r --alpha --dropout --epochs --batch-size --accumulate --lr --loraplus --seed "
    "--weight-decay --warmup --clip-norm --patience --checkpoint-every --neutral --limit --max-length "
    "--held-out --split-seed",
    "sweep": "--threads --r --alpha --dropout --lr --loraplus --budget --trials --repeats --full-lr --head-lr --seed",
    "demo": "--limit",
    "advise": "--r --tokens --batch --memory",
    "explain": "--r --alpha --tokens",
    "tune": "--tokens --r --dropout --budget",
    "serve-bench": "--tokens --sequence --adapters --ranks --rounds",
    "check": "--jobs",
}
NAMES = {
    "train": "--device --backend --init --schedule --monitor --task --dtype --data",
    "sweep": "--init --device --backend --data",
    "advise": "--dtype --task-type",
    "explain": "--chip --task-type",
    "tune": "--dtype --ops",
    "serve-bench": "--dtype --device --distribution",
    "check": "--archs --dtypes",
    "merge": "--dtype --adapter",
    "compat": "--readme",
}
OUTPUTS = {
    "train": "--out", "sweep": "--out", "demo": "--out", "merge": "--out", "advise": "--json", "tune": "--out",
    "serve-bench": "--out", "check": "--json --markdown", "compat": "--markdown",
}  # fmt: skip
NO_NUMBER = ("", " ", "nan", "-nan", "inf", "-inf", "1e400", "-1e400", "x", "--", "1:0", "0x1p5", "9" * 400, "\udcff")
NO_NAME = ("", "nope", "meta", "\udcff", "x" * 500, "--", "a\nb", "../nope")
NO_OUTPUT = ("", " ", "/dev/null/x", "x" * 5000, "\udcff", "--", "a\0b")


def lines(options, values):
    return [(c, o, v) for c, names in options.items() for o in names.split() for v in values]


REFUSED = [*lines(NUMBERS, NO_NUMBER), *lines(NAMES, NO_NAME), *lines(OUTPUTS, NO_OUTPUT)]


@pytest.fixture
def parsed(monkeypatch, tmp_path):
    """Record the arguments of commands instead of running them."""
    monkeypatch.chdir(tmp_path)
    found = []
    for module, name in RUNS.items():
        monkeypatch.setattr(module, name, lambda arguments: found.append(arguments) or 0)
    return found


@pytest.mark.sampled(8)
@pytest.mark.parametrize("command", sorted({command for command, *_ in REFUSED}))
def test_values_that_no_option_takes(command, parsed, capsys):
    mine = [(option, value) for of, option, value in REFUSED if of == command]
    for option, value in mine:
        line = [command, *NEEDED.get(command, []), f"{option}={value}"]
        try:
            status: object = main(line)
        except SystemExit as stopped:
            status = stopped.code
        shown = capsys.readouterr().err
        assert status == 2, line
        assert ": error: " in shown, line
        assert len(shown.splitlines()[-1]) < 2000, line
    assert parsed == []


def test_there_are_many():
    assert len(REFUSED) > 700


HOSTILE = (
    *NO_NUMBER,
    *NO_NAME,
    "-1",
    "0",
    "0.5",
    "1",
    "2",
    "1e38",
    "2147483648",
    "9223372036854775808",
    "None",
    "[",
    ",",
)


@pytest.mark.sampled(7)
@pytest.mark.parametrize("module", RUNS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_any_value_is_refused_or_a_number_of_use(module, parsed, capsys):
    """All options in the parser: exit status 2, or finite values."""
    command = module.__name__.rpartition(".")[2].replace("_", "-")
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    module.add_parser(subparsers, *([train.chosen_task([])] if module in (train, sweep) else []))
    count = 0
    for action in subparsers.choices[command]._actions:
        if action.nargs == 0 or isinstance(action, argparse._HelpAction):
            continue
        for value in HOSTILE:
            given = [f"{action.option_strings[0]}={value}"] if action.option_strings else [value]
            needed = NEEDED.get(command, []) if action.option_strings else []
            try:
                status: object = main([command, *needed, *given])
            except SystemExit as stopped:
                status = stopped.code
            assert status in (0, 2), given
            count += 1
        capsys.readouterr()
    for arguments in parsed:
        for name, value in vars(arguments).items():
            for each in value if isinstance(value, list) else [value]:
                assert not isinstance(each, float) or math.isfinite(each), (command, name, value)
                assert not isinstance(each, int) or abs(each) < 2**63, (command, name, value)
    assert count or command == "doctor"


@pytest.mark.parametrize(
    "line",
    [
        "", "nope", "train --r", "train --r 1 2", "train --task", "train extra", "train --speed 3", "doctor x",
        "advise", "merge", "merge --adapter .", "check", "check --compile --archs", "check --compile --archs sm_1",
        "tune", "sweep --lr", "serve-bench --tokens", "train --resume --overwrite", "sweep --resume --overwrite",
        "-x", "--",
        "advise bert-base bert-base", "train --task translation --neutral 1", "train --task causal-lm --split-seed 1",
    ],
)  # fmt: skip
def test_lines_that_are_no_command(line, parsed, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    assert stopped.value.code == 2
    assert parsed == []
    assert ": error: " in capsys.readouterr().err


def test_under_torchrun_one_process_reports(parsed, monkeypatch, capsys):
    shown = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stopped:
            main(["train", "--r", "0"])
        assert stopped.value.code == 2
        shown.append(capsys.readouterr().err)
    assert "argument --r: '0' was given" in shown[0]
    assert shown[1] == ""


def test_the_last_of_two_counts(parsed):
    assert main(["train", "--r", "4", "--r", "8"]) == 0
    assert parsed[0].r == 8


@pytest.mark.sampled(4)
@pytest.mark.parametrize("threads", ["30000", "100000", "2147483647", "2147483648"])
def test_more_threads_than_cores_crashed_the_process(threads):
    command = [sys.executable, "-m", "lora_kernels.cli", "train", "--threads", threads]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"argument --threads: '{threads}' was given; accepted is a whole number of at least 0" in done.stderr


DAMAGES = [
    ("model.safetensors", 100), ("model.safetensors", 5), ("model.safetensors", 0), ("model.safetensors", -4),
    ("tokenizer.json", 50), ("tokenizer_config.json", 10), ("config.json", 30), ("config.json", 0),
]  # fmt: skip


@pytest.mark.parametrize(("file", "size"), DAMAGES)
def test_truncated_model_files_are_one_sentence(tiny_model, tiny_data, tmp_path, capsys, file, size):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / file).write_bytes((model / file).read_bytes()[:size])
    out = ["--out", str(tmp_path / "out")]
    commands = [["train", "--model", str(model), "--data", str(tiny_data), "--quiet", *out]]
    if not file.startswith("tokenizer"):
        commands.append(["explain", "--model", str(model)])
    for command in commands:
        assert main(command) == 2
        shown = capsys.readouterr().err
        assert shown.startswith(f"lora-kernels {command[0]}: model '{model}' cannot be loaded as Auto")
        assert shown.count("\n") == 1


def test_a_head_of_other_classes_is_one_sentence(tiny_model, tiny_data, tmp_path, capsys):
    from transformers import AutoModelForSequenceClassification

    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3).save_pretrained(model)
    capsys.readouterr()
    assert (
        main(["train", "--model", str(model), "--data", str(tiny_data), "--quiet", "--out", str(tmp_path / "o")]) == 2
    )
    assert "has a head for 3 classes, and 2 are needed: give data (or labels) of 3" in capsys.readouterr().err


def test_texts_beyond_the_positions_are_refused_before_training(tiny_model, tmp_path, capsys):
    data = tmp_path / "long.csv"
    data.write_text("text,label\n" + "".join(f"{'film ' * 80},{'up' if i % 2 else 'down'}\n" for i in range(100)))
    options = ["train", "--model", str(tiny_model), "--data", str(data), "--quiet", "--out", str(tmp_path / "out")]
    assert main([*options, "--max-length", "33"]) == 2
    assert "has positions for 32 tokens, and 33 would be given: give a smaller --max-length" in capsys.readouterr().err
    assert main([*options, "--max-length", "32", "--limit", "8", "--no-checkpoints"]) == 0


def test_ids_beyond_the_vocabulary_are_one_sentence(tiny_model, tiny_data, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary.update({word: i + 5000 for word, i in vocabulary.items() if not word.startswith("[")})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert (
        main(["train", "--model", str(model), "--data", str(tiny_data), "--quiet", "--out", str(tmp_path / "o")]) == 2
    )
    assert "torch refused (IndexError: index out of range in self)" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="limits of a process")
def test_a_full_disk_is_one_sentence(tiny_model, tiny_data, tmp_path):
    """Simulate a full disk by a limit on the size of files: the same writes fail."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); "
        "from lora_kernels.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    line = ["train", "--model", str(tiny_model), "--data", str(tiny_data), "--quiet", "--limit", "16", "--r", "2"]
    done = subprocess.run(
        [sys.executable, "-c", code, *line, "--out", str(tmp_path / "out")], capture_output=True, text=True
    )
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2
    assert last.startswith("lora-kernels train: ")
    assert "File too large" in last
    assert "write to another disk" in last
    assert "Traceback" not in done.stderr
