"""The two files on disk: what is written survives a crash, what is read has been checked claim by claim."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_kernels.adapters import files
from lora_kernels.adapters.files import CONFIG_NAME, WEIGHTS_NAME, read_adapter, write_adapter
from lora_kernels.atomic_write import atomic_write
from lora_kernels.errors import AdapterFormatError

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
    kept = dict(list(tensors().items())[: 1 if header == 640 else 2])
    for padding in range(max(header - 700, 0), header):  # until the header, padded to eights, has just this length
        write_adapter(tmp_path, kept, {"r": 2, "revision": "x" * padding})
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


EDITED = CONFIG | {"r": 3}


def test_the_file_counts_when_a_user_edits_it(tmp_path: Path) -> None:
    for _ in range(2):  # where there was none, and where the same was there
        write_adapter(tmp_path, tensors(), CONFIG)
        (tmp_path / CONFIG_NAME).write_text(json.dumps(EDITED))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_adapter(tmp_path)[1] == EDITED
        write_adapter(tmp_path, tensors(), CONFIG)
        assert read_adapter(tmp_path)[1] == CONFIG


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b'{"r": 1, "r": 2}', b"[" * 99_999])
def test_a_broken_file_beside_good_weights_is_refused(tmp_path: Path, text: bytes) -> None:
    write_adapter(tmp_path, tensors(), CONFIG)
    (tmp_path / CONFIG_NAME).write_bytes(text)
    with pytest.raises(AdapterFormatError, match=CONFIG_NAME):
        read_adapter(tmp_path)


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_same_save_again_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    write_adapter(tmp_path / "once", tensors(), CONFIG)
    with monkeypatch.context() as patch:
        if interrupted:
            patch.setattr(files, "atomic_write", only_weights)
        write_adapter(tmp_path / "twice", tensors(), CONFIG)
    write_adapter(tmp_path / "twice", tensors(), CONFIG)
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


@pytest.mark.parametrize("trick", ["removed", "link", "folder", "fifo", "huge"])
def test_what_is_no_file_beside_good_weights_is_refused(tmp_path: Path, trick: str) -> None:
    for value in (1, 2):  # the second save replaces a file, so that a missing one is no crash of it
        write_adapter(tmp_path, tensors(value), CONFIG | {"r": value})
    path = tmp_path / CONFIG_NAME
    path.rename(tmp_path / "other")
    if trick == "link":
        path.symlink_to(tmp_path / "other")
    elif trick == "folder":
        path.mkdir()
    elif trick == "fifo":
        os.mkfifo(path)
    elif trick == "huge":
        with path.open("wb") as file:
            file.truncate(100 << 30)
    with pytest.raises(AdapterFormatError, match=CONFIG_NAME):
        read_adapter(tmp_path)
    if trick == "link":
        assert read_adapter(tmp_path, follow_symlinks=True)[1]["r"] == 2


def before(folder: Path, state: str) -> None:
    """What a save finds in the place of adapter_config.json."""
    folder.mkdir(exist_ok=True)
    path = folder / CONFIG_NAME
    if state == "adapter":
        write_adapter(folder, tensors(0), CONFIG | {"r": 7})
    elif state == "broken":
        path.write_bytes(b"{")
    elif state == "link":
        (folder / "other").write_text(json.dumps(CONFIG | {"r": 7}))
        path.symlink_to(folder / "other")


@pytest.mark.parametrize("state", ["nothing", "adapter", "broken", "link"])
def test_the_copy_counts_where_a_save_was_interrupted_between_the_two_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    before(tmp_path, state)
    monkeypatch.setattr(files, "atomic_write", only_weights)
    write_adapter(tmp_path, tensors(1), CONFIG)
    read, config = read_adapter(tmp_path, follow_symlinks=state == "link")
    assert (float(read["a"][0, 0]), config) == (1, CONFIG)
    monkeypatch.undo()
    if state != "nothing":
        (tmp_path / CONFIG_NAME).unlink()
    (tmp_path / CONFIG_NAME).write_text(json.dumps(EDITED))  # from now on it is the user's
    assert read_adapter(tmp_path)[1] == EDITED


def only_weights(path: Path, data: bytes) -> None:
    if path.name == WEIGHTS_NAME:
        atomic_write(path, data)


def test_a_file_that_was_linked_to_is_judged_by_the_link_and_its_content(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", tensors(), CONFIG)
    (tmp_path / "a" / CONFIG_NAME).rename(tmp_path / "c")
    (tmp_path / "a" / CONFIG_NAME).symlink_to(tmp_path / "c")
    (tmp_path / "c").write_text(json.dumps(EDITED))
    assert read_adapter(tmp_path / "a", follow_symlinks=True)[1] == EDITED


@pytest.mark.filterwarnings("ignore:.*differs from the copy")
def test_weights_of_a_release_in_which_the_copy_counted(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / WEIGHTS_NAME, metadata={"format": "pt", "adapter_config": json.dumps(CONFIG)})
    assert read_adapter(tmp_path)[1] == CONFIG
    (tmp_path / CONFIG_NAME).write_text(json.dumps(EDITED))
    with pytest.warns(UserWarning, match="differs from the copy"):
        assert read_adapter(tmp_path)[1] == EDITED
    (tmp_path / CONFIG_NAME).write_text("{")
    with pytest.raises(AdapterFormatError, match=CONFIG_NAME):
        read_adapter(tmp_path)


@pytest.mark.parametrize("saves", [1, 2, 3])
@pytest.mark.parametrize("fresh", [True, False])
def test_saves_while_an_adapter_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: int, fresh: bool
) -> None:
    if not fresh:
        write_adapter(tmp_path, tensors(9), CONFIG | {"r": 9})
    opened, values = files.open_stored, iter(range(1, saves + 1))

    def open_after_saves(*arguments: Any, **options: Any) -> Any:
        for value in values:
            write_adapter(tmp_path, tensors(value), CONFIG | {"r": value})
        return opened(*arguments, **options)

    monkeypatch.setattr(files, "open_stored", open_after_saves)
    read, config = read_adapter(tmp_path)
    assert (float(read["a"][0, 0]), config["r"]) == (saves, saves)


def test_saves_without_end_while_an_adapter_is_read_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, values = files.open_stored, iter(range(1, 10**6))

    def open_after_saves(*arguments: Any, **options: Any) -> Any:
        for value in (next(values), next(values)):
            write_adapter(tmp_path, tensors(value), CONFIG | {"r": value})
        return opened(*arguments, **options)

    monkeypatch.setattr(files, "open_stored", open_after_saves)
    with pytest.raises(AdapterFormatError, match="was replaced 20 times while it was read"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("name", "fails", "config_is_new"),
    [
        (CONFIG_NAME, "fsync", False),
        (CONFIG_NAME, "replace", False),
        (CONFIG_NAME, "open", True),  # of the folder, after both files were replaced
        (WEIGHTS_NAME, "open", False),
    ],
)
def test_a_write_that_fails_after_the_weights_were_replaced_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fails: str, config_is_new: bool
) -> None:
    write_adapter(tmp_path, tensors(1), CONFIG)

    def write(path: Path, data: bytes) -> None:
        with monkeypatch.context() as patch:
            if path.name == name:
                patch.setattr(files.os, fails, full)
            atomic_write(path, data)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "atomic_write", write)
        with pytest.raises(OSError, match="No space left on device") as caught:
            write_adapter(tmp_path, tensors(2), CONFIG | {"r": 9})
    assert caught.value.errno == 28
    told = "was replaced and adapter_config.json was not" in str(caught.value)
    assert told == ("save again" in str(caught.value)) == (not config_is_new)
    read, config = read_adapter(tmp_path)
    assert (float(read["a"][0, 0]), config) == (2, CONFIG | {"r": 9})
    assert json.loads((tmp_path / CONFIG_NAME).read_text()) == (config if config_is_new else CONFIG)


def test_a_folder_in_the_place_of_the_configuration_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_adapter(tmp_path, tensors(1), CONFIG)
    (tmp_path / CONFIG_NAME).unlink()
    (tmp_path / CONFIG_NAME).mkdir()
    old = (tmp_path / WEIGHTS_NAME).read_bytes()
    with pytest.raises(OSError, match="is a folder, expected a file; nothing was written"):
        write_adapter(tmp_path, tensors(2), CONFIG)
    assert (tmp_path / WEIGHTS_NAME).read_bytes() == old


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
            read, config = read_adapter(tmp_path)
            assert {float(read["a"].min()), float(read["a"].max()), float(read["b"][0])} == {float(config["r"])}
    for writer in writers:
        writer.result()
    assert sorted(os.listdir(tmp_path)) == [CONFIG_NAME, WEIGHTS_NAME]
    assert json.loads((tmp_path / CONFIG_NAME).read_text()) == read_adapter(tmp_path)[1]


# The calls of a save after and before which it is killed; the others change nothing on the disk.
CALLS = ("open", "write", "flush", "fsync", "replace", "unlink", "mkdir", "close", "flock", "lstat", "readlink")


def killed_save(folder: Path, value: int, after: int) -> bool:
    """Save a version in a process that is killed before its ``after``-th call; whether there were fewer calls."""
    child = os.fork()
    if child == 0:
        left = after

        def count(frame: Any, event: str, function: Any) -> None:
            nonlocal left
            if event in ("c_call", "c_return") and getattr(function, "__name__", "") in CALLS:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.setprofile(count)
            write_adapter(folder, tensors(value), CONFIG | {"r": value})
            sys.setprofile(None)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status == 0


@pytest.mark.sampled(4)
@pytest.mark.parametrize("state", ["nothing", "adapter", "broken", "link"])
def test_a_save_killed_at_any_call_leaves_the_old_or_the_new_adapter(tmp_path: Path, state: str) -> None:
    results, kills = list[int](), 0
    while True:
        folder = tmp_path / str(kills)
        before(folder, state)
        finished = killed_save(folder, 5, kills)
        if not (folder / WEIGHTS_NAME).exists():
            assert state != "adapter"
            results.append(-1)
        else:
            read, config = read_adapter(folder)
            values = {float(x) for tensor in read.values() for x in (tensor.min(), tensor.max())}
            results.append(config["r"])
            assert values == {0.0 if config["r"] == 7 else float(config["r"])}
        write_adapter(folder, tensors(1), CONFIG)  # whatever was left does not hinder the next save
        assert sorted(set(os.listdir(folder)) - {"other"}) == [CONFIG_NAME, WEIGHTS_NAME]
        assert read_adapter(folder)[1] == CONFIG
        kills += 1
        if finished:
            break
    assert kills > 30, "hardly any call was counted: nothing was tested"
    assert results == sorted(results, key=lambda r: r == 5), "the new adapter, once there, is not lost"
    assert set(results) == {7 if state == "adapter" else -1, 5}


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
    atomic_write(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
