"""The two files of an adapter on disk: written so that a crash loses nothing, read so that no file can do harm.

One rename is the commit point. The configuration lies in the metadata of adapter_model.safetensors, with the weights it
belongs to; adapter_config.json is a copy for other readers (PEFT), written after it. A process killed at any moment
leaves the old or the new adapter, whole: two files that both counted could be found mismatched.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from lora_kernels.errors import AdapterFormatError

try:
    import fcntl
except ImportError:  # not a POSIX system: writers to one folder are then not kept apart
    fcntl = None  # type: ignore[assignment]

WEIGHTS_NAME, CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"
CONFIG_METADATA = "adapter_config"
MAX_WEIGHTS_BYTES, MAX_HEADER_BYTES, MAX_CONFIG_BYTES = 16 << 30, 64 << 20, 4 << 20
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8,
    "F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8,
}  # fmt: skip


def write_adapter(folder: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Publish `tensors` and `config` as the adapter in `folder`, which is created where missing.

    Writers to one folder wait for each other. Raises OSError (disk full, no permission), the old adapter being intact.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True).encode()
    stored = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    data = _with_metadata(save(stored), {"format": "pt", CONFIG_METADATA: text.decode()})
    with _sole_writer(folder):
        for leftover in folder.glob(".adapter_*.tmp"):  # of a writer that was killed
            leftover.unlink(missing_ok=True)
        write_whole(folder / WEIGHTS_NAME, data)
        if not _holds(folder / CONFIG_NAME, text):
            write_whole(folder / CONFIG_NAME, text)


def read_adapter(folder: str | os.PathLike[str], follow_symlinks: bool = False) -> tuple[dict[str, torch.Tensor], Any]:
    """The tensors and the parsed configuration of the adapter in `folder`, not yet checked against any model.

    The configuration inside the weights file counts where there is one. Raises AdapterFormatError for anything that is
    not a whole safetensors file with a JSON configuration.
    """
    folder = Path(folder)
    data = _read(folder / WEIGHTS_NAME, MAX_WEIGHTS_BYTES, follow_symlinks)
    text = _check_header(data).get(CONFIG_METADATA)
    if text is None:
        config = parse_json(_read(folder / CONFIG_NAME, MAX_CONFIG_BYTES, follow_symlinks), CONFIG_NAME)
    else:
        config = parse_json(text, f"the configuration in {WEIGHTS_NAME}")
        copy = folder / CONFIG_NAME
        if copy.exists() and not _holds(copy, text.encode(errors="replace")):
            warnings.warn(f"{copy} differs from the configuration in {WEIGHTS_NAME}; the latter counts", stacklevel=3)
    try:
        return load(data), config
    except SafetensorError as error:
        raise AdapterFormatError(f"{WEIGHTS_NAME}: {error}") from None


def read_weights(path: Path, follow_symlinks: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata of one safetensors file. Raises AdapterFormatError."""
    data = _read(path, MAX_WEIGHTS_BYTES, follow_symlinks)
    metadata = _check_header(data)
    try:
        return load(data), metadata
    except SafetensorError as error:
        raise AdapterFormatError(f"{path}: {error}") from None


def _with_metadata(data: bytes, metadata: dict[str, str]) -> bytes:
    """The safetensors file `data` with metadata in a fixed order, which the library's own hash map does not keep: the
    same adapter is the same file, byte for byte."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps({"__metadata__": metadata} | json.loads(data[8 : 8 + size]), separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return b"".join((len(header).to_bytes(8, "little"), header, data[8 + size :]))


def _holds(path: Path, text: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(text) and path.read_bytes() == text


@contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # released by the kernel if this process dies
        yield
    finally:
        os.close(handle)


def write_whole(path: Path, data: bytes) -> None:
    """Write ``path`` so that a reader, or a crash at any moment, sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # so that the new name survives a power cut, too
        finally:
            os.close(folder)


def _read(path: Path, limit: int, follow_symlinks: bool) -> bytes:
    # O_NONBLOCK: opening a FIFO must not wait for its writer. What was opened is what is checked: no race.
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if not follow_symlinks:
        if path.is_symlink():
            raise AdapterFormatError(f"{path} is a symbolic link; pass follow_symlinks=True if that is meant")
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
            raise AdapterFormatError(f"{path} has {status.st_size} bytes; at most {limit} are read")
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(limit + 1)
    finally:
        os.close(handle)


def parse_json(text: Any, name: str) -> Any:
    """The JSON value in ``text``. Raises AdapterFormatError, also where an object has a name twice."""

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


def _check_header(data: bytes) -> dict[str, Any]:
    """Check every claim of the header against the bytes that are there; returns the metadata."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(MAX_HEADER_BYTES, len(data) - 8):
        # only here: a header of 640 bytes begins as a pickle does, one of 19,280 as a zip
        if len(data) < 8 or data[:2] in (b"PK", b"\x80\x02", b"\x80\x04"):
            raise AdapterFormatError(f"{WEIGHTS_NAME} is not a safetensors file (a zip or pickle is never read)")
        raise AdapterFormatError(f"{WEIGHTS_NAME}: header of {size} bytes in a file of {len(data)}: truncated?")
    header = parse_json(data[8 : 8 + size], WEIGHTS_NAME)
    if not isinstance(header, dict):
        raise AdapterFormatError(f"{WEIGHTS_NAME}: the header is no JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterFormatError(f"{WEIGHTS_NAME}: the metadata is no object of strings")
    end = 0
    for begin, stop, key in sorted(_span(key, entry) for key, entry in header.items()):
        if begin != end:
            raise AdapterFormatError(f"{WEIGHTS_NAME}: {key[:200]!r} starts at byte {begin}, expected {end}")
        end = stop
    if end != len(data) - 8 - size:
        raise AdapterFormatError(f"{WEIGHTS_NAME}: {len(data) - 8 - size} bytes of data, expected {end}: truncated?")
    return metadata


def _span(key: str, entry: Any) -> tuple[int, int, str]:
    where = f"{WEIGHTS_NAME}: {key[:200]!r}"
    if not isinstance(entry, dict):
        raise AdapterFormatError(f"{where} has no description")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise AdapterFormatError(f"{where} has dtype {str(dtype)[:20]!r}; known are {', '.join(ITEM_BYTES)}")
    if not _are_sizes(shape) or len(shape) > 8:
        raise AdapterFormatError(f"{where} has shape {str(shape)[:60]}, expected a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise AdapterFormatError(f"{where} has data_offsets {str(offsets)[:60]}, expected two")
    if offsets[1] - offsets[0] != math.prod(shape) * ITEM_BYTES[dtype]:
        raise AdapterFormatError(f"{where} of shape {shape} and dtype {dtype} does not fill bytes {offsets}")
    return offsets[0], offsets[1], key


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
