"""What a call needs beside time, counted and not timed: bytes kept for the backward, operators dispatched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.timing import MIB, Call


def saved_mib(call: Call, given: Iterable[Tensor]) -> float:
    """MiB that autograd keeps between the forward and the backward of one ``call``, which makes both.

    The storages of ``given``, the parameters, are there anyway and left out; X counts, for it could be freed. Memory
    that several saved tensors share counts once.
    """
    parameters = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(kept.values()) / MIB


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def operators(call: Call) -> int:
    """PyTorch operators that one ``call`` dispatches, views included."""
    with _Counter() as counter:
        call()
    return counter.calls
