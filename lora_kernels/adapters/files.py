"""Writes and reads the two files of an adapter: a crash loses nothing, and reading a malicious file does no harm.

The configuration in adapter_config.json is used, as in PEFT. Two files cannot be replaced in one step, so a save
replaces adapter_model.safetensors first; the metadata of the new file holds a copy of the new configuration and the
fingerprint (SHA-256) of the adapter_config.json that is replaced next. If a reader finds the file with this
fingerprint, the save was interrupted between the two steps, and the reader uses the copy. If the process is killed at
any moment, the folder holds the old or the new adapter, complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from lora_kernels.adapters.stored import PICKLE, Limits, StoredTensors, open_plain, open_stored, parse_json
from lora_kernels.atomic_write import atomic_write
from lora_kernels.errors import AdapterFormatError

try:
    import fcntl
except ImportError:  # not a POSIX system: writers to one folder are then not kept apart
    fcntl = None  # type: ignore[assignment]

WEIGHTS_NAME, CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"
CONFIG_METADATA, REPLACED_METADATA = "adapter_config", "adapter_config_replaced"
# Fingerprints of a missing adapter_config.json, and of one that cannot be read (different from every SHA-256).
NO_FILE, UNREADABLE = "0" * 64, "?"
MAX_CONFIG_BYTES, MAX_ATTEMPTS = 4 << 20, 20
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def write_adapter(folder: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Publish `tensors` and `config` as the adapter in `folder`, which is created where missing.

    Writers to one folder wait for each other. Raises OSError (disk full, no permission). Then the old adapter is
    intact; or, if the message says so, the weights are the new ones and adapter_config.json is the old one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True).encode()
    stored = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    data = save(stored)
    with _sole_writer(folder):
        for leftover in folder.glob(".adapter_*.tmp"):  # of a writer that was killed
            leftover.unlink(missing_ok=True)
        if (folder / CONFIG_NAME).is_dir():
            raise IsADirectoryError(
                f"{folder / CONFIG_NAME} is a folder, expected a file; nothing was written. Remove it"
            )
        _, before = _read_config(folder / CONFIG_NAME, follow_symlinks=False)
        replaced = (
            NO_FILE if before == _digest(text) else before.ljust(64)
        )  # so that the same save gives the same bytes
        metadata = {"format": "pt", CONFIG_METADATA: text.decode(), REPLACED_METADATA: replaced}
        old = _inode(folder / WEIGHTS_NAME)
        try:
            atomic_write(folder / WEIGHTS_NAME, _with_metadata(data, metadata))
            if before != _digest(text):
                atomic_write(folder / CONFIG_NAME, text)
        except OSError as error:
            _, now = _read_config(folder / CONFIG_NAME, follow_symlinks=False)
            if _inode(folder / WEIGHTS_NAME) == old or now == _digest(text):
                raise
            raise OSError(
                error.errno,
                f"{error.strerror}: {folder / WEIGHTS_NAME} was replaced and {CONFIG_NAME} was not. lora_kernels reads "
                "the folder as the new adapter, by the configuration inside the weights; PEFT would read the new "
                "weights with the old configuration. Remove the cause and save again",
            ) from error


def _inode(path: Path) -> int | None:
    return path.lstat().st_ino if os.path.lexists(path) else None


class AdapterFiles:
    """An adapter's parsed configuration, and its tensors as the header of the weights describes them.

    config: the parsed JSON, not yet checked. described: {key: tensor on the meta device}. read() returns the tensors.
    """

    def __init__(self, config: Any, stored: StoredTensors) -> None:
        self.config, self.described, self.read = config, stored.described, stored.read


@contextmanager
def open_adapter(
    folder: str | os.PathLike[str], follow_symlinks: bool = False, limits: Limits | None = None
) -> Iterator[AdapterFiles]:
    """Open the adapter in `folder` while the block runs; only AdapterFiles.read reads the tensors.

    Raises AdapterFormatError unless the folder holds a complete safetensors file within `limits` and a JSON
    configuration.
    """
    folder = Path(folder)
    _refuse_pickles(folder)
    for _ in range(MAX_ATTEMPTS):
        found, fingerprint = _read_config(folder / CONFIG_NAME, follow_symlinks)  # a save replaces it last
        with open_stored(folder / WEIGHTS_NAME, follow_symlinks, limits) as stored:
            copy = stored.metadata.get(CONFIG_METADATA)
            text, name = found, CONFIG_NAME
            if copy is not None and fingerprint == stored.metadata.get(REPLACED_METADATA, NO_FILE):
                text, name = copy, f"the configuration in {WEIGHTS_NAME}"
            elif isinstance(found, AdapterFormatError) or (copy is not None and found != copy.encode(errors="replace")):
                if _read_config(folder / CONFIG_NAME, follow_symlinks)[1] != fingerprint:
                    continue  # replaced since it was read: the weights may be those of a later save
                if isinstance(found, AdapterFormatError):
                    raise found
                if REPLACED_METADATA not in stored.metadata:  # an earlier release used the copy
                    warnings.warn(
                        f"{folder / CONFIG_NAME} differs from the copy in {WEIGHTS_NAME}; the file is used",
                        stacklevel=4,
                    )
            yield AdapterFiles(parse_json(text, name), stored)
            return
    raise AdapterFormatError(
        f"{folder} was replaced {MAX_ATTEMPTS} times while it was read; read it when no program writes to it"
    )


def read_adapter(folder: str | os.PathLike[str], follow_symlinks: bool = False) -> tuple[dict[str, torch.Tensor], Any]:
    """The tensors and the parsed configuration of the adapter in `folder`, not yet checked against any model."""
    with open_adapter(folder, follow_symlinks) as files:
        return files.read(), files.config


def _read_config(path: Path, follow_symlinks: bool) -> tuple[str | bytes | AdapterFormatError, str]:
    """The bytes of adapter_config.json, or the error why it cannot be read; and its fingerprint."""
    content: bytes | AdapterFormatError
    try:
        with open_plain(path, MAX_CONFIG_BYTES, follow_symlinks) as (file, _):
            content = file.read()
    except AdapterFormatError as error:
        content = error
    if path.is_symlink():
        return content, _digest(b"link to " + os.fsencode(os.readlink(path)))
    if isinstance(content, bytes):
        return content, _digest(content)
    return content, UNREADABLE if os.path.lexists(path) else NO_FILE


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _refuse_pickles(folder: Path) -> None:
    if folder.is_file():
        wrong = PICKLE if folder.suffix in PICKLE_SUFFIXES else f"a file; give the folder that holds {WEIGHTS_NAME}"
        raise AdapterFormatError(f"{folder} is {wrong}")
    if os.path.lexists(folder / WEIGHTS_NAME) or not folder.is_dir():
        return
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    pickles = [name for name in pickles if "adapter" in name or "model" in name or "lora" in name]
    if pickles:
        raise AdapterFormatError(f"{folder} has no {WEIGHTS_NAME}, and {pickles[0]} is {PICKLE}")


def _with_metadata(data: bytes, metadata: dict[str, str]) -> bytes:
    """The safetensors file `data` with metadata in a fixed order, which the library's own hash map does not keep: the
    same adapter is the same file, byte for byte."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps({"__metadata__": metadata} | json.loads(data[8 : 8 + size]), separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return b"".join((len(header).to_bytes(8, "little"), header, data[8 + size :]))


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
