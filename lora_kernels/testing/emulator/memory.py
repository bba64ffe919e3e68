"""Memory and barriers of testing/emulator/__init__.py: who wrote what, and who may see it."""

from __future__ import annotations

import torch
from torch import Tensor

NAN = float("nan")
Clock = dict[int, int]  # partition -> how many of its global stores are known


class EmulatorError(AssertionError):
    """The kernel did what the hardware does not define, or waits for ever."""


def merge(into: Clock, other: Clock) -> None:
    """Everything that ``other`` knows is known to ``into`` as well."""
    for partition, count in other.items():
        into[partition] = max(into.get(partition, 0), count)


class Barrier:
    """An mbarrier: a phase ends when its arrivals have come and all bytes that it expects have landed."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count
        self.missing, self.bytes, self.phase = count, 0, 0
        self.clock: Clock = {}

    def arrive(self, count: int, clock: Clock) -> None:
        """``count`` arrivals of a partition that knows ``clock``."""
        if count > self.missing:
            raise EmulatorError(f"{self.name}: more arrivals than the {self.count} of a phase")
        self.missing -= count
        merge(self.clock, clock)
        self.land(0)

    def land(self, count: int) -> None:
        """``count`` bytes have landed, fewer than none are expected."""
        self.bytes -= count
        if not self.missing and not self.bytes:
            self.phase, self.missing = self.phase + 1, self.count


class Block:
    """What the partitions of one program share: its shared memory and its barriers."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.memories: list[Shared] = []
        self.barriers: dict[tuple[int, int], Barrier] = {}

    def of_partition(self, partition: int, before: int, after: int) -> None:
        """Moves what ``partition`` wrote from one state of visibility to the next."""
        for memory in self.memories:
            memory.state[memory.state == before * (partition + 1)] = after * (partition + 1)


class Shared:
    """An allocation, NaN at first. state: 0 visible to all; n + 1: written by partition n through its registers, not
    yet fenced; -(n + 1): fenced, not yet joined by a barrier. tag: the layout an element was written in."""

    def __init__(self, block: Block, dtype: torch.dtype, shape: list[int]) -> None:
        self.values = torch.full(shape, NAN, dtype=dtype) if dtype.is_floating_point else torch.zeros(shape)
        self.state = torch.zeros(shape, dtype=torch.int16)
        self.tag = torch.zeros(shape, dtype=torch.int16)
        self.number = len(block.memories)
        block.memories.append(self)


class Global:
    """A tensor in global memory. owner, count: which partition stored an element last in this launch, its how manieth
    store that was; another partition sees it once it has acquired that store."""

    def __init__(self, tensor: Tensor) -> None:
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        self.size = 1 + sum((size - 1) * stride for size, stride in sizes) if tensor.numel() else 0
        self.flat = tensor.as_strided((self.size,), (1,))
        self.owner = torch.full((self.size,), -1, dtype=torch.int32)
        self.count = torch.zeros(self.size, dtype=torch.int64)

    def check(self, index: Tensor) -> None:
        """Raises where an index is outside of the tensor."""
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= self.size):
            raise EmulatorError(f"out of bounds: {int(index.min())} .. {int(index.max())} of {self.size} elements")

    def load(self, index: Tensor, me: int, clock: Clock) -> Tensor:
        """What ``me`` sees of the elements."""
        self.check(index)
        got, owner = self.flat[index].clone(), self.owner[index]
        for other in set(owner.unique().tolist()) - {-1, me}:
            unseen = (owner == other) & (self.count[index] > clock.get(other, 0))
            if unseen.any() and not got.is_floating_point():
                raise EmulatorError("integers are read that another partition stored and never released")
            got[unseen] = NAN
        return got

    def store(self, index: Tensor, values: Tensor, me: int, count: int) -> None:
        """The ``count``-th store of ``me``, to be made known by a barrier of its block and a release."""
        self.check(index)
        owner = self.owner[index]
        if ((owner != -1) & (owner != me)).any():
            raise EmulatorError("a partition overwrites what another one stored in the same launch")
        self.flat[index], self.owner[index], self.count[index] = values, me, count
