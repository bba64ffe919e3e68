"""What works beside the program in testing/emulator/__init__.py: copies in, copies out and products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.testing.emulator.language import Desc, Tile, View
from lora_kernels.testing.emulator.machine import current
from lora_kernels.testing.emulator.memory import NAN, Barrier, EmulatorError

_BITS = {2: torch.int16, 4: torch.int32}


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors of one dtype hold the same bits, NaN included."""
    return a.contiguous().view(_BITS[a.element_size()]) == b.contiguous().view(_BITS[b.element_size()])


class Load:
    """A copy of a box into shared memory, under way from its issue to its landing."""

    def __init__(self, desc: Desc, coord: Sequence[int], view: View, barrier: Barrier) -> None:
        if view.shape != desc.block_type.shape or str(view.layout) != desc.layout:
            raise EmulatorError(f"a box {desc.block_type.shape} of {desc.layout} into {view.shape} of {view.layout}")
        if (desc.memory.owner >= 0).any():
            raise EmulatorError("a copy engine reads what this launch stored through registers")
        self.desc, self.coord, self.view, self.barrier, self.machine = desc, coord, view, barrier, current().machine
        view.values.fill_(NAN)
        view.state[view.state < 0] = 0
        view.tag.fill_(view.own)
        self.machine.loads.append(self)

    def land(self) -> None:
        """The box is there, but where stores through registers were never fenced from it."""
        self.machine.loads.remove(self)
        source, target = self.desc.part(self.coord)
        box = torch.zeros(self.view.shape, dtype=self.desc.dtype)
        box[target] = self.desc.matrix[source]
        self.view.values.copy_(torch.where(self.view.state == 0, box, NAN))
        self.barrier.land(self.desc.block_type.nbytes)
        self.machine.quiet = 0


class Store:
    """A copy of shared memory to a box; it may be read until it is waited for."""

    def __init__(self, desc: Desc, coord: Sequence[int], view: View) -> None:
        if view.shape != desc.block_type.shape or str(view.layout) != desc.layout:
            raise EmulatorError(f"{view.shape} of {view.layout} into a box {desc.block_type.shape} of {desc.layout}")
        self.desc, self.coord, self.view, self.me = desc, coord, view, current()
        self.seen = view.read(self.me.number, engine=True)

    def finish(self, lost: bool = False) -> None:
        """Writes the box: NaN where the memory changed under the copy, or was lost to it."""
        values = torch.where(_same(self.view.read(self.me.number, engine=True), self.seen), self.seen, NAN)
        source, target = self.desc.part(self.coord)
        self.desc.matrix[source] = NAN if lost else values[target]


class Product:
    """acc + a b under way; its operands must hold the same from its issue to its wait."""

    def __init__(self, a: View | Tile, b: View, acc: Tile) -> None:
        self.me, self.operands, self.acc = current(), (a, b), acc
        (m, k), (k_of_b, n) = a.shape, b.shape
        if k != k_of_b or acc.shape != [m, n] or m % 64 or n % 8 or k % 16 or a.dtype != b.dtype:
            raise EmulatorError(f"no product of {a.shape} {a.dtype} and {b.shape} {b.dtype} into {acc.shape}")
        self.seen = self._read()
        self.result = Tile(torch.empty(m, n), pending=True)

    def _read(self) -> list[Tensor]:
        return [x.read(self.me.number, engine=True).clone() if isinstance(x, View) else x.value for x in self.operands]

    def finish(self) -> None:
        """The result, NaN where an operand changed."""
        a, b = (torch.where(_same(x, y), x, NAN).float() for x, y in zip(self.seen, self._read(), strict=True))
        self.result.kept, self.result.pending = torch.addmm(self.acc.value, a, b), False


def warpgroup_mma(a: Any, b: View, acc: Tile, *, use_acc: bool = True, is_async: bool = False, **_: Any) -> Tile:
    """acc + a b, begun; to be used by another product or after a wait."""
    me = current()
    me.machine.step()
    product = Product(a, b, acc if use_acc else Tile(torch.zeros(acc.shape)))
    me.products.append(product)
    return product.result if is_async else warpgroup_mma_wait(0, (product.result,))


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Tile] = ()) -> Any:
    """Ends all but the last ``num_outstanding`` products of this partition."""
    me = current()
    me.machine.step()
    while len(me.products) > num_outstanding:
        me.products.pop(0).finish()
    return deps[0] if len(deps) == 1 else tuple(deps)
