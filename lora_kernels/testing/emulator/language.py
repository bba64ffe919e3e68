"""Gluon's language over torch tensors, for testing/emulator: tiles, pointers, descriptors and shared memory.
Layouts of registers are accepted and ignored."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lora_kernels.testing.emulator.machine import Machine, current
from lora_kernels.testing.emulator.memory import NAN, Barrier, EmulatorError, Global, Shared


class Tile:
    """A tensor in registers. The result of a product is NaN to all but products until somebody has waited for it."""

    type = SimpleNamespace(layout=None)

    def __init__(self, value: Tensor, pending: bool = False) -> None:
        self.kept, self.pending = value, pending

    @property
    def value(self) -> Tensor:
        return torch.full_like(self.kept, NAN) if self.pending else self.kept

    @property
    def shape(self) -> list[int]:
        return list(self.kept.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.kept.dtype

    def __getitem__(self, index: Any) -> Tile:
        return Tile(self.value[index])

    def to(self, dtype: torch.dtype) -> Tile:
        return Tile(self.value.to(dtype))

    def reshape(self, *shape: Any) -> Tile:
        return Tile(self.value.reshape(*shape))

    def permute(self, *order: Any) -> Tile:
        return Tile(self.value.permute(*order))

    def split(self) -> tuple[Tile, Tile]:
        left, right = self.value.unbind(-1)
        return Tile(left), Tile(right)


def _binary(function: Callable[[Any, Any], Any], turned: bool = False) -> Callable[[Tile, Any], Any]:
    def apply(self: Tile, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        values = self.value, other.value if isinstance(other, Tile) else other
        return Tile(function(*(reversed(values) if turned else values)))

    return apply


for _name in ("add", "sub", "mul", "floordiv", "mod", "and_", "or_", "lshift", "rshift", "lt", "le", "gt", "ge", "eq", "ne"):  # fmt: skip  # noqa: E501
    _function = getattr(operator, _name)
    setattr(Tile, f"__{_name.strip('_')}__", _binary(_function))
    setattr(Tile, f"__r{_name.strip('_')}__", _binary(_function, turned=True))


class Pointer:
    """A tensor's first element and offsets from it, an int or a Tile."""

    def __init__(self, memory: Global, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=memory.flat.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + other)

    @property
    def index(self) -> Tensor:
        return self.offset.value.long() if isinstance(self.offset, Tile) else torch.tensor(self.offset)


class Desc:
    """A tensor descriptor: boxes of a matrix, zero past its end."""

    def __init__(self, machine: Machine, host: Any) -> None:
        self.memory = machine.memory(host.base)
        self.matrix = host.base.as_strided(host.shape, host.strides)
        self.dtype, self.layout = host.base.dtype, str(host.layout)
        shape = list(host.block_shape)
        nbytes = shape[0] * shape[1] * self.dtype.itemsize
        self.block_type = SimpleNamespace(shape=shape, nbytes=nbytes, element_ty=self.dtype)

    def part(self, coord: Sequence[int]) -> tuple[Any, Any]:
        """(what of the matrix a box at ``coord`` covers, what of the box that is)"""
        spans = [(c, min(c + size, most)) for c, size, most in zip(coord, self.block_type.shape, self.matrix.shape)]  # noqa: B905
        if any(c < 0 for c in coord):
            raise EmulatorError(f"a box at {coord}")
        return tuple(slice(c, max(c, end)) for c, end in spans), tuple(slice(0, max(0, end - c)) for c, end in spans)


class View:
    """Shared memory in a shape and layout. A tag stands for both: what is put in one is not found in another."""

    tags: dict[Any, int] = {}  # noqa: RUF012

    def __init__(
        self, memory: Shared, values: Tensor, state: Tensor, tag: Tensor, layout: Any, own: int | None = None
    ) -> None:
        self.memory, self.values, self.state, self.tag, self.layout = memory, values, state, tag, layout
        self.own = (
            own if own is not None else self.tags.setdefault((str(layout), tuple(values.shape)), len(self.tags) + 1)
        )
        self.shape, self.dtype = list(values.shape), values.dtype

    def _with(self, change: Callable[[Tensor], Tensor], own: int | None) -> View:
        return View(self.memory, change(self.values), change(self.state), change(self.tag), self.layout, own)

    def index(self, i: int) -> View:
        return self._with(lambda t: t[i], None)

    def permute(self, order: Sequence[int]) -> View:
        return self._with(lambda t: t.permute(tuple(order)), self.own)

    def slice(self, start: int, length: int, dim: int = 0) -> View:
        return self._with(lambda t: t.narrow(dim, start, length), self.own)

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> View:
        size = torch.Size(shape).numel()
        if dtype != self.dtype or size > self.values.numel() or not self.values.is_contiguous():
            raise EmulatorError(f"{list(shape)} of {dtype} in place of {self.shape} of {self.dtype}")
        values, state, tag = (t.view(-1)[:size].view(shape) for t in (self.values, self.state, self.tag))
        return View(self.memory, values, state, tag, layout)

    def read(self, me: int, engine: bool) -> Tensor:
        """What ``me`` sees, or what the copy and matrix engines see that it sets going."""
        mine = me + 1
        seen = (self.state == 0) | (self.state == -mine) | ((self.state == mine) & (not engine))
        return torch.where(seen & (self.tag == self.own), self.values, NAN)

    def load(self, layout: Any = None) -> Tile:
        me = current()
        me.machine.step()
        return Tile(self.read(me.number, engine=False))

    def store(self, tile: Tile) -> None:
        me = current()
        me.machine.step()
        if tile.dtype != self.dtype or tile.shape != self.shape:
            raise EmulatorError(f"a tile {tile.shape} of {tile.dtype} into {self.shape} of {self.dtype}")
        self.values.copy_(tile.value)
        self.state.fill_(me.number + 1)
        self.tag.fill_(self.own)

    @property
    def key(self) -> tuple[int, int]:
        """(allocation, place in it): what an mbarrier is known by"""
        return self.memory.number, int(self.values.storage_offset())

    @property
    def barrier(self) -> Barrier:
        """The mbarrier that was initialised here."""
        found = current().block.barriers.get(self.key)
        if found is None:
            raise EmulatorError("an mbarrier is used that was never initialised")
        return found
