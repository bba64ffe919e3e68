import argparse
import os

import pytest
import torch

from lora_kernels.finetune import values
from lora_kernels.finetune.tasks import TASKS

HOSTILE = (
    "", " ", "nan", "-nan", "inf", "-inf", "1e400", "-1e400", "0x10", "1_0_", "--", "-",
    "9" * 5000, "x" * 5000,
)  # fmt: skip


def refusal(read, text):
    with pytest.raises(argparse.ArgumentTypeError) as refused:
        read(text)
    message = str(refused.value)
    assert "accepted" in message
    assert len(message) < 600
    return message


@pytest.mark.parametrize(
    ("read", "right", "wrong"),
    [
        (values.rank, {"1": 1, "2147483647": 2**31 - 1}, ["0", "2147483648", "1.0", "1e3", "9" * 30, f"-{'9' * 30}"]),
        (values.seed, {"0": 0, "9223372036854775807": 2**63 - 1}, ["9223372036854775808"]),
        (values.split_seed, {"4294967295": 2**32 - 1}, ["4294967296"]),
        (values.probability, {"0": 0.0, "1": 1.0, "0.5": 0.5}, ["1.0001", "-1e-9"]),
        (values.held_out, {"0.25": 0.25}, ["0", "0.5", "0.7"]),
        (values.rate, {"1e-320": 1e-320, "3e38": 3e38}, ["0", "-0.0", "3.1e38"]),
        (values.seconds, {"0.5": 0.5}, ["0", "1e10"]),
        (values.number, {"32": 32, "0.5": 0.5, "-1": -1, "1e3": 1000}, ["4e38", "-4e38"]),
        (values.several(values.count), {"1, 2,": [1, 2]}, [",", "1,0", "1,x"]),
        (values.one_of(("a", "b")), {"a": "a"}, ["c", "A"]),
        (values.backend, {"auto": "auto", "reference": "reference"}, ["fast", "triton:"]),
        (
            values.device,
            {"auto": "auto", "cpu": "cpu"},
            ["meta", "cuda:99", "cuda:-1", "cpu:x", "fpga", "privateuseone"],
        ),
    ],
)
def test_what_is_accepted_and_what_is_not(read, right, wrong):
    for text, value in right.items():
        assert read(text) == value
    for text in (*wrong, *HOSTILE):
        refusal(read, text)


def test_names():
    assert values.names("a, b") == ["a", "b"]
    for text in ("a,a", "a,,b", ",", "", " "):
        refusal(values.names, text)


def test_threads_end_at_the_cores(monkeypatch):
    """Tens of thousands of OpenMP threads crash the process: torch must not get such a number."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert [values.threads(text) for text in ("0", "1", "4")] == [0, 1, 4]
    for text in ("5", "30000", "100000", "2147483648", *HOSTILE):
        assert "at least 0 and at most 4, the number of cores here" in refusal(values.threads, text)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)  # OMP_NUM_THREADS=8; reproduce.sh names it
    assert values.threads("8") == 8


def test_input(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("x")
    assert values.input_file("movies")("movies") == "movies"
    assert values.input_file()(str(file)) == str(file)
    assert values.input_path(str(file)) == file
    assert values.input_folder(str(tmp_path)) == tmp_path
    for text in ("", " ", "x" * 5000, str(tmp_path / "missing"), str(file / "below"), "a\x00b"):
        refusal(values.input_file("movies"), text)
        refusal(values.input_folder, text)
    assert "this is a folder" in refusal(values.input_file(), str(tmp_path))
    refusal(values.input_folder, str(file))


def test_output(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("x")
    new = tmp_path / "new" / "below"
    assert values.output_folder(str(new)) == values.output_file(str(new)) == new
    assert values.output_folder(str(tmp_path)) == tmp_path
    assert values.output_file(str(file)) == values.replaced_file(str(file)) == file
    assert str(values.output_file(os.devnull)) == os.devnull
    refusal(values.replaced_file, os.devnull)  # replacing it would overwrite the device with a file
    refusal(values.output_folder, str(file))
    refusal(values.output_file, str(tmp_path))
    for text in ("", " ", "x" * 5000, f"{file}/below", "/dev/null/below", "a\x00b"):
        refusal(values.output_folder, text)
        refusal(values.output_file, text)
    assert not new.parent.exists()


def test_write_protected_places_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    file = tmp_path / "a"
    file.write_text("x")
    assert "write-protected" in refusal(values.output_folder, str(tmp_path / "new"))
    assert "write-protected" in refusal(values.output_file, str(file))
    assert "can be read" in refusal(values.input_file(), str(file))


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_what_a_task_can_monitor_is_what_it_measures(task):
    assert task.monitors == ("loss", *task().metrics)
    assert task.monitor in task.monitors
