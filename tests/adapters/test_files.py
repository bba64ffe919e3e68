"""The two files on disk: what is written survives a crash, what is read has been checked claim by claim."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_kernels.adapters import files
from lora_kernels.adapters.files import CONFIG_NAME, WEIGHTS_NAME, read_adapter, write_adapter

CONFIG = {"peft_type": "LORA", "r": 2}


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"a": torch.full((2, 3), value), "b": torch.full((4,), value, dtype=torch.bfloat16)}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    written = {
        **tensors(),
        "strided": torch.arange(12.0).view(3, 4).t(),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2),
        "f8": torch.ones(3).to(torch.float8_e4m3fn),
        "flag": torch.tensor([True, False]),
    }
    written["alias"] = written["a"]
    write_adapter(tmp_path / "new" / "folder", written, CONFIG)
    read, config = read_adapter(tmp_path / "new" / "folder")
    assert config == CONFIG
    assert read.keys() == written.keys()
    for key, tensor in written.items():
        assert read[key].dtype == tensor.dtype, key
        assert torch.equal(read[key].float(), tensor.float()), key


@pytest.mark.parametrize(("header", "begins"), [(640, b"\x80\x02"), (1152, b"\x80\x04"), (19280, b"PK")])
def test_a_header_of_unlucky_length_is_not_taken_for_a_pickle_or_a_zip(
    tmp_path: Path, header: int, begins: bytes
) -> None:
    for padding in range(header - 300, header):  # until the header, padded to eights, has just this length
        write_adapter(tmp_path, tensors(), {"peft_type": "LORA", "r": 2, "revision": "x" * padding})
        data = (tmp_path / WEIGHTS_NAME).read_bytes()
        if data[:2] == begins:
            break
    assert int.from_bytes(data[:8], "little") == header
    found, _ = read_adapter(tmp_path)
    assert torch.equal(found["a"], tensors()["a"])


def test_files_are_what_other_readers_expect(tmp_path: Path) -> None:
    from safetensors import safe_open

    old = os.umask(0o027)
    try:
        write_adapter(tmp_path, tensors(), CONFIG)
    finally:
        os.umask(old)
    assert sorted(os.listdir(tmp_path)) == [CONFIG_NAME, WEIGHTS_NAME]
    assert json.loads((tmp_path / CONFIG_NAME).read_text()) == CONFIG
    assert torch.equal(load_file(tmp_path / WEIGHTS_NAME)["a"], tensors()["a"])
    with safe_open(tmp_path / WEIGHTS_NAME, "pt") as file:
        assert file.metadata()["format"] == "pt"
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in os.listdir(tmp_path)} == {0o640}


def test_the_configuration_in_the_weights_counts_and_a_difference_is_told(tmp_path: Path) -> None:
    write_adapter(tmp_path, tensors(), CONFIG)
    (tmp_path / CONFIG_NAME).write_text(json.dumps(CONFIG | {"r": 3}))
    with pytest.warns(UserWarning, match="differs from the configuration in"):
        assert read_adapter(tmp_path)[1] == CONFIG
    (tmp_path / CONFIG_NAME).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_adapter(tmp_path)[1] == CONFIG


def test_without_it_the_json_file_counts(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / WEIGHTS_NAME, metadata={"format": "pt"})
    (tmp_path / CONFIG_NAME).write_text(json.dumps(CONFIG))
    assert read_adapter(tmp_path)[1] == CONFIG


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_a_failed_save_leaves_the_old_adapter_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    write_adapter(tmp_path, tensors(1), CONFIG)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if fails == "write":
            patch.setattr(files, "save", fail)
        else:
            patch.setattr(files.os, fails, fail)
        with pytest.raises(OSError, match="No space"):
            write_adapter(tmp_path, tensors(2), CONFIG | {"r": 9})
    assert sorted(os.listdir(tmp_path)) == [CONFIG_NAME, WEIGHTS_NAME]
    read, config = read_adapter(tmp_path)
    assert (read["a"][0, 0], config) == (1, CONFIG)


def test_writers_to_one_folder_wait_for_each_other(tmp_path: Path) -> None:
    def write(value: int) -> None:
        for _ in range(10):
            write_adapter(tmp_path, tensors(value), CONFIG | {"r": value})

    pool = ThreadPoolExecutor(4)
    writers = [pool.submit(write, value) for value in (1, 2, 3, 4)]
    while not all(writer.done() for writer in writers):
        if (tmp_path / WEIGHTS_NAME).exists():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # between the two renames the copy is a moment old
                read, config = read_adapter(tmp_path)
            assert {float(read["a"].min()), float(read["a"].max()), float(read["b"][0])} == {float(config["r"])}
    for writer in writers:
        writer.result()
    assert sorted(os.listdir(tmp_path)) == [CONFIG_NAME, WEIGHTS_NAME]
    assert json.loads((tmp_path / CONFIG_NAME).read_text()) == read_adapter(tmp_path)[1]


def kill_while_saving(folder: Path, kills: int) -> None:
    """After every kill -9 the folder must hold one version, whole: its configuration and all its tensors agree."""
    rng = random.Random(0)

    def version(value: int) -> dict[str, torch.Tensor]:
        return {f"layer.{i}": torch.full((128, 96), float(value)) for i in range(24)}

    write_adapter(folder, version(0), CONFIG | {"r": 0})
    seen, littered = set(), 0
    for _ in range(kills):
        start = rng.randrange(1, 10**6)
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)
                for value in range(start, start + 10**6):
                    write_adapter(folder, version(value % 1000), CONFIG | {"r": value % 1000})
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.002, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        littered += len(os.listdir(folder)) > 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read, config = read_adapter(folder)
        values = {float(x) for tensor in read.values() for x in (tensor.min(), tensor.max())}
        assert (len(read), values) == (24, {float(config["r"])})
        seen.add(config["r"])
    assert len(seen) > kills // 4, "the child hardly ever got to save: nothing was tested"
    assert littered, "no kill fell into a save: nothing was tested"
    write_adapter(folder, version(1), CONFIG)
    assert sorted(os.listdir(folder)) == [CONFIG_NAME, WEIGHTS_NAME]


def test_twenty_kills_while_saving_lose_nothing(tmp_path: Path) -> None:
    kill_while_saving(tmp_path, 20)


@pytest.mark.slow
def test_two_hundred_kills_while_saving_lose_nothing(tmp_path: Path) -> None:
    kill_while_saving(tmp_path, 200)


def test_saving_replaces_a_link_and_not_what_it_points_to(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "out"
    folder.mkdir()
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        (folder / name).symlink_to(victim)
    write_adapter(folder, tensors(), CONFIG)
    assert victim.read_text() == "precious"
    assert read_adapter(folder)[1] == CONFIG


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.write_whole(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
