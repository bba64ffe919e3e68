"""Every claim of a file is checked before its bytes are used: damaged and hostile files are refused with the reason."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from lora_kernels.adapters import files, stored
from lora_kernels.adapters.files import CONFIG_NAME, WEIGHTS_NAME, read_adapter, write_adapter
from lora_kernels.errors import AdapterFormatError

CONFIG = {"peft_type": "LORA", "r": 2}


def tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def file_of(header: Any, data: bytes = b"", size: int | None = None) -> bytes:
    """A weights file with this header, written out as JSON unless it is bytes already."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


GOOD = save(tensors(), metadata={"format": "pt", "adapter_config": json.dumps(CONFIG)})
DEEP = b"[" * 100_000 + b"]" * 100_000

HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a safetensors file"),
    "short": (b"\x05\x00", "not a safetensors file"),
    "zip": (b"PK\x03\x04" + b"\0" * 60, "zip or a pickle.*save_file"),
    "pickle": (b"\x80\x04\x95" + b"\0" * 60, "zip or a pickle.*weights_only=True"),
    "text": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "truncated"),
    "truncated in the data": (GOOD[:-1], "truncated"),
    "truncated in the header": (GOOD[:40], "truncated"),
    "only the length": (GOOD[:8], "truncated"),
    "trailing bytes": (GOOD + b"\0", "expected"),
    "huge header": (struct.pack("<Q", 2**63) + b"{}", "truncated"),
    "header no JSON": (file_of(b"{'a': 1}"), "is not JSON"),
    "header not UTF-8": (file_of(b'{"\xff\xfe": {}}'), "is not JSON"),
    "header no object": (file_of([1, 2]), "not a JSON object"),
    "header deep": (file_of(DEEP), "is not JSON"),
    "header with twins": (file_of(b'{"a":' + json.dumps(entry()).encode() + b',"a":1}'), "occurs twice"),
    "number of 5000 digits": (file_of(b'{"a": ' + b"9" * 5000 + b"}"), "is not JSON"),
    "entry no object": (file_of({"a": 3}), "'a' is not described by a JSON object"),
    "no dtype": (file_of({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8), "dtype"),
    "unknown dtype": (file_of({"a": entry(dtype="F4")}, b"\0" * 8), "'a' has dtype 'F4'; accepted are BOOL"),
    "dtype no string": (file_of({"a": entry(dtype=["F32"])}, b"\0" * 8), "dtype"),
    "negative shape": (file_of({"a": entry((-2, -1))}, b"\0" * 8), "'a' has shape"),
    "float shape": (file_of({"a": entry((2.0,))}, b"\0" * 8), "'a' has shape"),
    "bool shape": (file_of({"a": entry((True, 2))}, b"\0" * 8), "'a' has shape"),
    "shape no list": (file_of({"a": entry() | {"shape": "2"}}, b"\0" * 8), "'a' has shape"),
    "overflowing shape": (file_of({"a": entry((2**40, 2**40))}, b"\0" * 8), "'a' has shape"),
    "wrong size": (file_of({"a": entry((3,))}, b"\0" * 8), "does not fill"),
    "offsets backwards": (file_of({"a": entry((2,), (8, 0))}, b"\0" * 8), "does not fill"),
    "offsets beyond the end": (file_of({"a": entry((2,), (8, 16))}, b"\0" * 8), "starts at byte 8, expected 0"),
    "one offset": (file_of({"a": entry((2,), (8,))}, b"\0" * 8), "data_offsets"),
    "overlap": (file_of({"a": entry(), "b": entry((2,), (4, 12))}, b"\0" * 12), "'b' starts at byte 4, expected 8"),
    "gap": (file_of({"a": entry(), "b": entry((2,), (12, 20))}, b"\0" * 20), "'b' starts at byte 12, expected 8"),
    "metadata no object": (file_of({"__metadata__": [1]}), "metadata"),
    "metadata not strings": (file_of({"__metadata__": {"adapter_config": {"r": 1}}}), "metadata"),
    "config in it no JSON": (file_of({"__metadata__": {"adapter_config": "{"}}), "configuration in .* is not JSON"),
    "config in it deep": (file_of({"__metadata__": {"adapter_config": DEEP.decode()}}), "is not JSON"),
    "config in it with twins": (file_of({"__metadata__": {"adapter_config": '{"r":1,"r":2}'}}), "occurs twice"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_malformed_weights_are_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    data, says = HOSTILE[name]
    (tmp_path / WEIGHTS_NAME).write_bytes(data)
    if "config in it" not in name:  # which counts where there is no file
        (tmp_path / CONFIG_NAME).write_text(json.dumps(CONFIG))
    with pytest.raises(AdapterFormatError, match=says) as caught:
        read_adapter(tmp_path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff\xfe\x00", DEEP, b'{"r": 1, "r": 2}', b"9" * 5000, b"{'r': 1}", b'{"r": 1} x']
)
def test_malformed_json_beside_pefts_weights_is_refused(tmp_path: Path, text: bytes) -> None:
    save_file(tensors(), tmp_path / WEIGHTS_NAME, metadata={"format": "pt"})
    (tmp_path / CONFIG_NAME).write_bytes(text)
    with pytest.raises(AdapterFormatError, match=CONFIG_NAME):
        read_adapter(tmp_path)


@pytest.mark.parametrize("name", [WEIGHTS_NAME, CONFIG_NAME])
@pytest.mark.parametrize("trick", ["missing", "directory", "fifo", "link", "dangling", "loop", "device", "huge"])
def test_what_is_no_plain_file_is_refused(
    tmp_path: Path, name: str, trick: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(tensors(), tmp_path / WEIGHTS_NAME)
    (tmp_path / CONFIG_NAME).write_text(json.dumps(CONFIG))
    path, real = tmp_path / name, tmp_path / "real"
    path.rename(real)
    says = {"missing": "No such file", "directory": "not a regular file", "fifo": "not a regular file"}
    if trick == "directory":
        path.mkdir()
    elif trick == "fifo":
        os.mkfifo(path)
    elif trick == "huge":
        real.rename(path)
        monkeypatch.setattr(stored, "MAX_BYTES", 20)
        monkeypatch.setattr(files, "MAX_CONFIG_BYTES", 20)
    elif trick != "missing":
        path.symlink_to({"link": real, "dangling": tmp_path / "no", "loop": path, "device": Path("/dev/zero")}[trick])
    with pytest.raises(
        AdapterFormatError, match=says.get(trick, "bytes; at most" if trick == "huge" else "symbolic link")
    ):
        read_adapter(tmp_path)
    if trick in ("dangling", "loop", "device"):
        with pytest.raises(AdapterFormatError, match=r"cannot be read|not a regular file"):
            read_adapter(tmp_path, follow_symlinks=True)


def test_links_are_followed_where_that_is_meant(tmp_path: Path) -> None:
    write_adapter(tmp_path / "blobs", tensors(), CONFIG)
    (tmp_path / "snapshot").mkdir()
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    with pytest.raises(AdapterFormatError, match="follow_symlinks=True"):
        read_adapter(tmp_path / "snapshot")
    assert read_adapter(tmp_path / "snapshot", follow_symlinks=True)[1] == CONFIG


@settings(max_examples=400)
@given(st.data())
def test_damaged_files_are_refused_or_read_whole(tmp_path: Path, data: st.DataObject) -> None:
    damaged = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged)))
        piece = data.draw(st.binary(max_size=3) | st.sampled_from([b'"', b"}", b"[", b"0", b"-1", b"F16", b"null"]))
        damaged[at : at + data.draw(st.integers(0, 3))] = piece
    (tmp_path / WEIGHTS_NAME).write_bytes(damaged)
    (tmp_path / CONFIG_NAME).unlink(missing_ok=True)
    try:
        read, _ = read_adapter(tmp_path)
    except AdapterFormatError:
        return
    assert all(isinstance(tensor, torch.Tensor) for tensor in read.values())


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", "adapter.pt", "my_lora.ckpt"])
def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path: Path, name: str) -> None:
    (tmp_path / CONFIG_NAME).write_text(json.dumps(CONFIG))
    torch.save(tensors(), tmp_path / name)
    (tmp_path / "training_args.bin").write_bytes(b"x")
    says = f"{name} is a pickle, which can run code.*torch.load.*weights_only=True.*save_file.*{WEIGHTS_NAME}"
    for place in (tmp_path, tmp_path / name):
        with pytest.raises(AdapterFormatError, match=says):
            read_adapter(place)
    (tmp_path / name).rename(tmp_path / WEIGHTS_NAME)
    with pytest.raises(AdapterFormatError, match=r"a zip or a pickle, which can run code.*save_file"):
        read_adapter(tmp_path)


def test_the_way_to_convert_a_pickle_leads_to_an_adapter(tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text(json.dumps(CONFIG))
    torch.save(tensors(), tmp_path / "adapter_model.bin")
    converted = torch.load(tmp_path / "adapter_model.bin", map_location="cpu", weights_only=True)
    save_file(converted, tmp_path / WEIGHTS_NAME)
    assert torch.equal(read_adapter(tmp_path)[0]["a"], tensors()["a"])


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(AdapterFormatError, match="is a file; give the folder that holds adapter_model"):
        read_adapter(tmp_path / "notes.txt")
    with pytest.raises(AdapterFormatError, match="No such file"):
        read_adapter(tmp_path / "nothing")
    (tmp_path / "optimizer.pt").write_text("x")  # no adapter's
    with pytest.raises(AdapterFormatError, match="No such file"):
        read_adapter(tmp_path)
