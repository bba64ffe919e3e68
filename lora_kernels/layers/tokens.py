"""Modules with a frozen weight of which some rows are trained: PEFT's trainable_token_indices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

DELTA = "trainable_tokens_delta"
ADDED = ("token_indices", "_index", "_base_weight")


class TrainedRows(nn.Module):
    """The module's own forward over W with the rows of ``token_indices`` exchanged for those of
    ``trainable_tokens_delta`` (n, D), which are trained: float32 beside a 16-bit W.

    A module whose class was exchanged by ``into_trained_rows``: the object, its weight and hooks stay. ``weight`` is
    the exchanged one, made anew whenever it is asked for; the frozen one is the Parameter of that name.
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
        """Put W with the trained rows in W's place, or ``merged``, which is that of a module that shares both."""
        if self._base_weight is None:
            value = nn.Parameter(self.weight.detach(), requires_grad=False) if merged is None else merged
            base = self._parameters["weight"]
            self._parameters["weight"] = value
            object.__setattr__(self, "_base_weight", base)
        found: nn.Parameter = self._parameters["weight"]  # type: ignore[assignment]
        return found

    def unmerge(self) -> None:
        """Put the very Parameter back that merge took out. Not merged: no effect."""
        if self._base_weight is not None:
            self._parameters["weight"] = self._base_weight
            object.__setattr__(self, "_base_weight", None)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copies and pickles; the class is made for them anew."""
        return _blank, (base_class(self),), dict(vars(self))


def into_trained_rows(module: nn.Module, indices: Sequence[int], delta: nn.Parameter | None = None) -> nn.Parameter:
    """Train these rows of an nn.Embedding or nn.Linear: as they are, or those of ``delta``. Returns them."""
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
    """Turn the module back into what it was, over the weight that it has: with the trained rows where it is merged."""
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
