"""Training checkpoints without pickle: tensors as safetensors, all else as JSON in the same file's metadata.

A checkpoint is one file. It is written under a temporary name, flushed to the disk, and renamed. Old checkpoints are
deleted only after the rename, so a crash at any moment leaves a complete one. The metadata contains the SHA-256 of
everything else; a file with changed bits is not used to resume.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lora_kernels.atomic_write import atomic_write
from lora_kernels.errors import LoRAKernelsError
from lora_kernels.finetune.train.digest import digest

_NAME = re.compile(r"^step-(\d{9})\.safetensors$")
_TAGS = ("$tensor", "$tuple", "$dict")


class CheckpointError(LoRAKernelsError, RuntimeError):
    """A checkpoint cannot be written or read, or belongs to another run."""


def pack(tree: Any, tensors: dict[str, torch.Tensor], path: str = "state") -> Any:
    """Convert ``tree`` to a JSON value. Its tensors are stored in ``tensors`` under their path, which replaces them.

    Accepts dicts, lists, tuples, tensors, strings, numbers, booleans and None: the contents of state_dicts of torch
    optimizers and schedulers. Raises CheckpointError for anything else; nothing is pickled.
    """
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if isinstance(tree, torch.Tensor):
        tensors[path] = tree.detach().cpu().contiguous()
        return {"$tensor": path}
    if isinstance(tree, list):
        return [pack(value, tensors, f"{path}.{i}") for i, value in enumerate(tree)]
    if isinstance(tree, tuple):
        return {"$tuple": [pack(value, tensors, f"{path}.{i}") for i, value in enumerate(tree)]}
    if isinstance(tree, dict):
        if all(isinstance(key, str) for key in tree) and not any(tag in tree for tag in _TAGS):
            return {key: pack(value, tensors, f"{path}.{key}") for key, value in tree.items()}
        return {"$dict": [[key, pack(value, tensors, f"{path}.{key}")] for key, value in tree.items()]}
    raise CheckpointError(f"{path} is a {type(tree).__name__}; a checkpoint holds tensors, numbers, strings and lists")


def unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Invert ``pack``."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$tuple" in value:
        return tuple(unpack(item, tensors) for item in value["$tuple"])
    if "$dict" in value:
        return {key: unpack(item, tensors) for key, item in value["$dict"]}
    return {key: unpack(item, tensors) for key, item in value.items()}


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoint files of ``folder``, newest first."""
    found = [path for path in folder.glob("step-*.safetensors") if _NAME.match(path.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Write ``state`` as the checkpoint of ``step`` and delete all but the ``keep`` newest.

    Checkpoints of later steps are deleted too: the run was not resumed from them, so they are damaged.
    """
    tensors: dict[str, torch.Tensor] = {}
    metadata = {"format": "pt", "state": json.dumps(pack(state, tensors))}
    path = folder / f"step-{step:09d}.safetensors"
    atomic_write(path, save(tensors, metadata=metadata | {"sha256": _sha256(metadata, tensors)}))
    later = [old for old in checkpoints(folder) if old.name > path.name]
    for old in (*later, *[old for old in checkpoints(folder) if old not in later][keep:]):
        old.unlink(missing_ok=True)
    for unfinished in folder.glob(".step-*.tmp"):  # of a run that was killed while writing
        unfinished.unlink(missing_ok=True)
    return path


def _sha256(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> str:
    """Compute the SHA-256 of the metadata and of the name, dtype, shape and bytes of each tensor."""
    return digest(*sorted(metadata.items()), *sorted(tensors.items()))


def _read(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        metadata = file.metadata() or {}
    written = metadata.pop("sha256", None)
    if written is None:
        raise ValueError("it has no SHA-256, so it was written by an earlier version of this program, or is damaged")
    if written != _sha256(metadata, tensors):
        raise ValueError("the SHA-256 of its content is not the one that was written with it, so bits have changed")
    return unpack(json.loads(metadata["state"]), tensors)


def load_newest(folder: Path) -> dict[str, Any] | None:
    """Read the newest intact checkpoint in ``folder``. Return None if the folder has no checkpoint.

    If a file is damaged, the next older one is used, with a UserWarning that names both. Raises CheckpointError if all
    files are damaged.
    """
    reasons = []
    for path in checkpoints(folder):
        try:
            state = _read(path)
        except (SafetensorError, ValueError, KeyError, OSError) as error:
            reasons.append(f"{path.name}: {error}")
            continue
        if reasons:
            why = f"newer checkpoints are damaged ({'; '.join(reasons)})"
            warnings.warn(f"resuming from {path.name}: {why}", stacklevel=2)
        return state
    if reasons:
        raise CheckpointError(f"no checkpoint in {folder} is whole ({'; '.join(reasons)}); delete them to start again")
    return None
