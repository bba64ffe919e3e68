"""The header is read first, and nothing else is read of a file that cannot be what it says or has no place here."""

from __future__ import annotations

import json
import os
import resource
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora_kernels.adapters import load_adapter
from lora_kernels.adapters.files import CONFIG_NAME, WEIGHTS_NAME
from lora_kernels.adapters.stored import DTYPES, Limits, StoredTensors, open_stored
from lora_kernels.errors import AdapterFormatError, AdapterPoolError
from lora_kernels.pool import AdapterPool

A = "base_model.model.blocks.0.q.lora_A.weight"
MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_every_dtype_is_read_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    numbers = torch.arange(24).view(2, 3, 4).to(dtype)
    written = {"a": numbers, "b": numbers[0, 0, 1], "c": numbers[:, :0], "d": numbers[1]}
    save_file({key: tensor.clone() for key, tensor in written.items()}, tmp_path / "x", metadata={"k": "v"})
    with open_stored(tmp_path / "x") as stored:
        assert stored.metadata == {"k": "v"}
        assert {key: (t.shape, t.dtype, t.is_meta) for key, t in stored.described.items()} == {
            key: (t.shape, t.dtype, True) for key, t in written.items()
        }
        read = stored.read()
    assert read.keys() == written.keys()
    for key, tensor in written.items():
        assert torch.equal(read[key].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), key


def test_a_file_that_becomes_shorter_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(9000)}, tmp_path / "x")
    with open_stored(tmp_path / "x") as stored:
        os.truncate(tmp_path / "x", 20000)
        with pytest.raises(AdapterFormatError, match="x became shorter while it was read"):
            stored.read()


def test_limits_are_what_an_adapter_of_the_model_may_need() -> None:
    small, large = Limits(nn.Linear(100, 100)), Limits(nn.Linear(100_000, 10**6, device="meta"))
    assert 10**5 < small.file < 100 * MIB
    assert small.header < 4 * MIB
    assert (large.file, large.header) == (Limits().file, small.header)


def header_of(entries: dict[str, Any]) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def entry(shape: list[int], offset: int = 0, dtype: str = "F32") -> dict[str, Any]:
    size = DTYPES[dtype].itemsize
    for number in shape:
        size *= number
    return {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}


def sparse(path: Path, start: bytes, size: int) -> None:
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)


def one_tensor(path: Path, shape: list[int], key: str = A) -> None:
    start = header_of({key: entry(shape)})
    sparse(path, start, len(start) + entry(shape)["data_offsets"][1])


def nested(path: Path, size: int, unit: bytes) -> None:
    """A header of this size whose JSON takes many times as much memory when it is parsed."""
    text = b'{"a":[' + unit * (size // len(unit)) + b"0]}"
    path.write_bytes(struct.pack("<Q", len(text)) + text)


BOMBS: dict[str, Callable[[Path], Any]] = {
    "100 GB": lambda path: one_tensor(path, [25 * 10**9]),
    "15 GB": lambda path: one_tensor(path, [2, 15 * 10**8]),
    "1 GB of the right key": lambda path: one_tensor(path, [2**14, 2**14]),
    "60 MB of the right key": lambda path: one_tensor(path, [2, 75 * 10**5]),
    "60 MB of another key": lambda path: one_tensor(path, [2, 75 * 10**5], "x"),
    "60 MB in one too many": lambda path: sparse(
        path, header_of({A: entry([2, 8]), "x": entry([15 * 10**6], 64)}), 60 * MIB
    ),
    "no header": lambda path: sparse(path, b"", 50 * MIB),
    "header of 100 MB": lambda path: sparse(path, struct.pack("<Q", 100 * MIB) + b"{}", 101 * MIB),
    "header of 30 MB": lambda path: nested(path, 30 * MIB, b"[],"),
    "header of lists": lambda path: nested(path, 2 * MIB, b"[],"),
    "header of objects": lambda path: nested(path, 2 * MIB, b'{"a":{}},'),
    "20,000 empty tensors": lambda path: path.write_bytes(header_of({f"k{i}": entry([0]) for i in range(20_000)})),
    "a long key": lambda path: path.write_bytes(header_of({"k" * (2 * MIB): entry([0])})),
    "long metadata": lambda path: path.write_bytes(header_of({"__metadata__": {"a": "b" * (2 * MIB)}})),
    "dimensions": lambda path: path.write_bytes(header_of({A: entry([2, 8]) | {"shape": [1] * 200_000}})),
    "empty and endless": lambda path: path.write_bytes(header_of({A: entry([0, 2**58, 2])})),
}


@pytest.fixture(params=["load_adapter", "pool"])
def reader(request: pytest.FixtureRequest, toy: Any, served: Any) -> tuple[nn.Module, Callable[[Path], Any]]:
    if request.param == "load_adapter":
        model = toy.fresh()
        return model, lambda folder: load_adapter(model, folder)
    model = served().eval()
    pool = AdapterPool(model, capacity=2, max_rank_total=8)
    return model, lambda folder: pool.load("a", folder)


def write_config(folder: Path) -> None:
    (folder / CONFIG_NAME).write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q", "v"]}))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", BOMBS)
def test_no_tensor_is_read_of_a_file_that_has_no_place_in_the_model(
    tmp_path: Path, name: str, reader: tuple[nn.Module, Callable[[Path], Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    BOMBS[name](tmp_path / WEIGHTS_NAME)
    write_config(tmp_path)
    model, read = reader
    before = {key: (tensor.data_ptr(), tensor.clone()) for key, tensor in model.state_dict().items()}
    monkeypatch.setattr(StoredTensors, "read", lambda self: pytest.fail("tensors were read"))
    tracemalloc.start()
    try:
        with pytest.raises((AdapterFormatError, AdapterPoolError)) as caught:
            read(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 150 * MIB
    assert len(str(caught.value)) < 900
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(after[key].data_ptr() == at and torch.equal(after[key], old) for key, (at, old) in before.items())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_bombs_are_refused_where_memory_is_short(tmp_path: Path, toy: Any) -> None:
    for name, write in BOMBS.items():
        folder = tmp_path / name
        folder.mkdir()
        write(folder / WEIGHTS_NAME)
        write_config(folder)
    model = toy.fresh()
    child = os.fork()
    if child == 0:
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + 400 * MIB
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            refused = 0
            for folder in tmp_path.iterdir():
                try:
                    load_adapter(model, folder)
                except AdapterFormatError:
                    refused += 1
            os._exit(0 if refused == len(BOMBS) else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


def test_a_config_that_is_a_bomb_is_refused(tmp_path: Path, toy: Any) -> None:
    one_tensor(tmp_path / WEIGHTS_NAME, [2, 8])
    for text in (b"[" * 4_000_000, b"[" + b"[]," * 1_300_000 + b"0]", b'{"a":' * 700_000):
        (tmp_path / CONFIG_NAME).write_bytes(text)
        with pytest.raises(AdapterFormatError, match=r"adapter_config.json|configuration"):
            load_adapter(toy.fresh(), tmp_path)
    sparse(tmp_path / CONFIG_NAME, b"{", 100 * GIB)
    with pytest.raises(AdapterFormatError, match="at most 4194304 are read"):
        load_adapter(toy.fresh(), tmp_path)
