"""Modules with a frozen weight and some trained rows: PEFT's trainable_token_indices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

DELTA = "trainable_tokens_delta"
ADDED = ("token_indices", "_index", "_base_weight")


class TrainedRows(nn.Module):
    """Runs the module's own forward with W whose rows ``token_indices`` are replaced by the trained rows
    ``trainable_tokens_delta`` (n, D), float32 for a 16-bit W.

    ``into_trained_rows`` changes the class of a module to this one; the object, its weight and its hooks stay. The
    attribute ``weight`` is W with the trained rows, computed at each access; the frozen W is the Parameter "weight".
    """

    token_indices: tuple[int, ...]
    trainable_tokens_delta: nn.Parameter
    _index: Tensor
    _base_weight: nn.Parameter | None

    @property
    def weight(self) -> Tensor:
        """W with the trained rows."""
        W: Tensor = self._parameters["weight"]  # type: ignore[assignment]
        if self._base_weight is not None:
            return W
        if self._index.device != W.device:
            self._index = torch.tensor(self.token_indices, dtype=torch.int64, device=W.device)
        return W.index_copy(0, self._index, self.trainable_tokens_delta.to(W.dtype))

    @property
    def merged(self) -> bool:
        """Whether the Parameter ``weight`` holds the trained rows."""
        return self._base_weight is not None

    def merge(self, merged: nn.Parameter | None = None) -> nn.Parameter:
        """Replace the Parameter W by W with the trained rows, or by ``merged`` of a module that shares both."""
        if self._base_weight is None:
            value = nn.Parameter(self.weight.detach(), requires_grad=False) if merged is None else merged
            base = self._parameters["weight"]
            self._parameters["weight"] = value
            object.__setattr__(self, "_base_weight", base)
        found: nn.Parameter = self._parameters["weight"]  # type: ignore[assignment]
        return found

    def unmerge(self) -> None:
        """Restore the Parameter that merge replaced. No effect if not merged."""
        if self._base_weight is not None:
            self._parameters["weight"] = self._base_weight
            object.__setattr__(self, "_base_weight", None)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """For copies and pickles: the class is made again from the module's own class."""
        return _blank, (base_class(self),), dict(vars(self))


def into_trained_rows(module: nn.Module, indices: Sequence[int], delta: nn.Parameter | None = None) -> nn.Parameter:
    """Train these rows of an nn.Embedding or nn.Linear, starting from W's rows, or as ``delta`` (n, D) if given.
    Returns the trained rows."""
    W = module._parameters["weight"]
    assert W is not None
    index = torch.tensor(list(indices), dtype=torch.int64, device=W.device)
    if delta is None:
        dtype = torch.float32 if W.dtype.itemsize == 2 else W.dtype
        delta = nn.Parameter(W.detach()[index].to(dtype, copy=True))
    module.__class__ = _trained_class(type(module))  # type: ignore[arg-type,assignment]  # a class is hashable
    module.register_parameter(DELTA, delta)
    vars(module).update(token_indices=tuple(indices), _index=index, _base_weight=None)
    return delta


def out_of_trained_rows(module: TrainedRows) -> None:
    """Give the module its own class again; its weight has the trained rows if it is merged, else it is W."""
    module.__class__ = base_class(module)  # type: ignore[assignment]
    del module._parameters[DELTA]
    for name in ADDED:
        del vars(module)[name]


def base_class(module: TrainedRows) -> type[nn.Module]:
    """The module's own class."""
    return type(module).__mro__[2]


@cache
def _trained_class(kind: type[nn.Module]) -> type[TrainedRows]:
    return type(f"TrainedRows{kind.__name__}", (TrainedRows, kind), {"__doc__": TrainedRows.__doc__})


def _blank(kind: type[nn.Module]) -> nn.Module:
    return _trained_class(kind).__new__(_trained_class(kind))  # type: ignore[arg-type]
