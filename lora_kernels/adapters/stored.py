"""Reads a safetensors file, header first: the whole header is checked against the file before any tensor is read."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import torch
from torch import Tensor, nn

from lora_kernels.errors import AdapterFormatError

MAX_BYTES, MAX_HEADER_BYTES = 16 << 30, 16 << 20
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
PICKLE = (
    "a pickle, which can run code while it is read, and is never read here. Convert it once, on a machine where that "
    "can do no harm: "
    "tensors = torch.load(path, map_location='cpu', weights_only=True), then "
    "safetensors.torch.save_file(tensors, 'adapter_model.safetensors')"
)


class Limits:
    """The most bytes of a file and of its header that are read. With a model: as many as its adapters could need."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self.file, self.header = MAX_BYTES, MAX_HEADER_BYTES
        if model is not None:
            numbers = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
            self.file = min(self.file, (64 << 20) + 8 * numbers)
            self.header = min(self.header, (2 << 20) + 1024 * sum(1 for _ in model.modules()))


class StoredTensors:
    """The tensors of an open file, of which only the header has been read.

    described: {key: tensor on the meta device} with shape and dtype. metadata: the strings beside them.
    """

    def __init__(self, file: BinaryIO, name: str, size: int, limits: Limits) -> None:
        self._file, self._name = file, name
        header, self._start = _header(file, name, size, limits)
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        if not isinstance(self.metadata, dict) or not all(isinstance(value, str) for value in self.metadata.values()):
            raise AdapterFormatError(f"{name}: the metadata is not a JSON object of strings")
        self._spans = sorted((_span(name, key, entry), key) for key, entry in header.items())
        end = 0
        for (begin, stop), key in self._spans:
            if begin != end:
                raise AdapterFormatError(f"{name}: {key[:200]!r} starts at byte {begin}, expected {end}")
            end = stop
        if end != size - self._start:
            raise AdapterFormatError(
                f"{name}: {size - self._start} bytes of data, expected {end}; the file may be truncated"
            )
        self.described = {
            key: torch.empty(header[key]["shape"], dtype=DTYPES[header[key]["dtype"]], device="meta")
            for _, key in self._spans
        }

    def read(self) -> dict[str, Tensor]:
        """The tensors, each in its own memory. Raises AdapterFormatError if the file has become shorter."""
        self._file.seek(self._start)
        tensors = {}
        for (begin, end), key in self._spans:
            like = self.described[key]
            tensor = torch.empty(like.shape, dtype=like.dtype)
            data = tensor.reshape(-1).view(torch.uint8)
            if self._file.readinto(data.numpy()) != end - begin:  # type: ignore[attr-defined]
                raise AdapterFormatError(f"{self._name} became shorter while it was read")
            tensors[key] = tensor
        return tensors


@contextmanager
def open_stored(path: Path, follow_symlinks: bool = False, limits: Limits | None = None) -> Iterator[StoredTensors]:
    """Open the safetensors file at ``path`` and read its header; StoredTensors.read works while the block runs.

    Raises AdapterFormatError for a symbolic link (unless follow_symlinks), for anything but a regular file, for a file
    or header above the limits, and for a header that does not fit the file.
    """
    limits = limits or Limits()
    with open_plain(path, limits.file, follow_symlinks) as (file, size):
        yield StoredTensors(file, path.name, size, limits)


@contextmanager
def open_plain(path: Path, limit: int, follow_symlinks: bool = False) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file of at most ``limit`` bytes; gives the file and its size."""
    # O_NONBLOCK: opening a FIFO must not wait for its writer. The checks use the open handle, so there is no race.
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if not follow_symlinks:
        if path.is_symlink():
            raise AdapterFormatError(f"{path} is a symbolic link; pass follow_symlinks=True to read it")
        flags |= getattr(os, "O_NOFOLLOW", 0)
    try:
        handle = os.open(path, flags)
    except OSError as error:
        raise AdapterFormatError(f"{path} cannot be read: {error.strerror}") from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise AdapterFormatError(f"{path} is not a regular file")
        if status.st_size > limit:
            raise AdapterFormatError(f"{path} has {status.st_size} bytes; at most {limit} are read here")
        with os.fdopen(handle, "rb", closefd=False) as file:
            yield file, status.st_size
    finally:
        os.close(handle)


def parse_json(text: Any, name: str) -> Any:
    """The parsed JSON. Raises AdapterFormatError if it cannot be parsed, or has a name twice in one object."""

    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise AdapterFormatError(f"{name}: a name occurs twice in one object")
        return result

    try:
        return json.loads(text, object_pairs_hook=no_twins)
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, AdapterFormatError):
            raise
        raise AdapterFormatError(f"{name} is not JSON: {str(error)[:100]}") from None


def _header(file: BinaryIO, name: str, size: int, limits: Limits) -> tuple[dict[str, Any], int]:
    """The parsed header, and where the data begins."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(limits.header, size - 8):
        # checked only here: a valid file with a header of 640 bytes begins like a pickle, one of 19,280 like a zip
        if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            raise AdapterFormatError(f"{name} is not a safetensors file but a zip or {PICKLE}")
        if len(start) < 8:
            raise AdapterFormatError(f"{name} is not a safetensors file: it has {size} bytes")
        if length <= size - 8:
            raise AdapterFormatError(f"{name}: header of {length} bytes; at most {limits.header} are read here")
        raise AdapterFormatError(f"{name}: header of {length} bytes in a file of {size}; the file may be truncated")
    header = parse_json(file.read(length), name)
    if not isinstance(header, dict):
        raise AdapterFormatError(f"{name}: the header is not a JSON object")
    return header, 8 + length


def _span(name: str, key: str, entry: Any) -> tuple[int, int]:
    """(first byte of a tensor, byte after its last one), counted from the start of the data."""
    where = f"{name}: {key[:200]!r}"
    if not isinstance(entry, dict):
        raise AdapterFormatError(f"{where} is not described by a JSON object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise AdapterFormatError(f"{where} has dtype {str(dtype)[:20]!r}; accepted are {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > 8 or math.prod(size or 1 for size in shape) >= 2**59:
        raise AdapterFormatError(f"{where} has shape {str(shape)[:60]}, expected a list of at most 8 sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise AdapterFormatError(f"{where} has data_offsets {str(offsets)[:60]}, expected [begin, end]")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise AdapterFormatError(f"{where} of shape {shape} and dtype {dtype} does not fill bytes {offsets}")
    return offsets[0], offsets[1]


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
