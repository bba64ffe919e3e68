"""SHA-256 of data, weights and saved states, to compare the inputs of two runs and to verify files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import ConcatDataset, Subset, TensorDataset


class _Hasher:
    """A SHA-256 that accepts nested lists, tuples, dicts, tensors, arrays, strings, bytes, numbers and None."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()

    def text(self, text: str) -> None:
        """Add a string with its length, so that "ab", "c" and "a", "bc" differ. Lone surrogates are accepted."""
        data = text.encode("utf-8", "surrogatepass")
        self.hash.update(b"%d:" % len(data))
        self.hash.update(data)

    def add(self, value: Any) -> None:
        """Add a value. TypeError for a type that is not listed above."""
        if isinstance(value, torch.Tensor):
            self.text(f"tensor {value.dtype} {tuple(value.shape)}")
            octets: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            self.hash.update(octets)
        elif isinstance(value, bytes):
            self.text(f"bytes {len(value)}")
            self.hash.update(value)
        elif hasattr(value, "tobytes") and hasattr(value, "dtype"):  # NumPy's arrays and scalars
            if value.dtype.hasobject:
                raise TypeError("an array of Python objects has no digest; give an array of numbers")
            self.text(f"array {value.dtype} {value.shape}")
            self.hash.update(value.tobytes())
        elif isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple | Mapping | torch.Tensor):
            self._parts(value)  # row by row, so that the JSON of a whole dataset is never in memory
        else:
            try:
                self.text(json.dumps(value))  # in C: a list of token ids takes 0.1 us for each id
            except TypeError:
                self._parts(value)

    def _parts(self, value: Any) -> None:
        if isinstance(value, Mapping):
            value = [part for item in value.items() for part in item]
        if not isinstance(value, list | tuple):
            raise TypeError(f"no digest of a {type(value).__name__}")
        self.text(f"list {len(value)}")
        for part in value:
            self.add(part)


def digest(*values: Any) -> str:
    """Compute the SHA-256 of ``values`` in hexadecimal. TypeError for types that ``_Hasher`` does not accept."""
    hasher = _Hasher()
    for value in values:
        hasher.add(value)
    return hasher.hash.hexdigest()


def data_digest(dataloader: Any) -> str | None:
    """Compute the SHA-256 of the rows of a dataloader's dataset, in order; None if they are not all in memory.

    Rows in memory: lists, tuples, tensors, torch's TensorDataset, and Subset and ConcatDataset of these. Other datasets
    may read files or draw random numbers for each row, so their rows are not read here.
    """
    try:
        return digest(_rows(getattr(dataloader, "dataset", dataloader)))
    except TypeError:
        return None


def _rows(dataset: Any) -> Any:
    if type(dataset) is TensorDataset:
        return list(dataset.tensors)
    if type(dataset) is Subset:
        return [_rows(dataset.dataset), [int(i) for i in dataset.indices]]
    if type(dataset) is ConcatDataset:
        return [_rows(part) for part in dataset.datasets]
    if type(dataset) in (list, tuple) or isinstance(dataset, torch.Tensor):
        return dataset
    raise TypeError(f"the rows of a {type(dataset).__name__} are not in memory")


@torch.no_grad()
def frozen_digest(model: nn.Module) -> str:
    """Compute the SHA-256 of the frozen parameters: their names, dtypes, shapes and sums of their bits.

    The sums are computed on the parameters' device, so a large model costs one read of its memory and no copy. Of
    sharded and meta tensors only name, dtype and shape are used.
    """
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    found: list[Any] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        found += [name, str(parameter.dtype), list(parameter.shape)]
        plain = type(parameter.data) is torch.Tensor and not parameter.is_meta and parameter.layout is torch.strided
        kind = words.get(parameter.element_size())
        if plain and kind is not None and parameter.numel():
            found.append(int(parameter.detach().contiguous().reshape(-1).view(kind).sum(dtype=torch.int64)))
    return digest(found)
