"""Caches the outputs that one call computed for several siblings, until each sibling is called; see groups.py."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_kernels.integrations.peft.sharing import Partners, in_backward

if TYPE_CHECKING:
    from lora_kernels.integrations.peft.groups import Group

Mode = tuple[bool, bool, torch.dtype | None]
State = list[Any]


class GroupOutputs:
    """Hold outputs for siblings that have not been called yet, by index, each with the state of its layer; and the
    input and the mode from which they were computed."""

    __slots__ = ("group", "mode", "outputs", "partners", "recomputed", "version", "x")

    def __init__(
        self, group: Group, partners: Partners, x: Tensor, mode: Mode, outputs: dict[int, tuple[Tensor, State]]
    ) -> None:
        self.group, self.partners, self.mode, self.outputs = group, partners, mode, outputs
        self.x: Tensor | None = x
        self.version, self.recomputed = x._version, in_backward()
        if self.recomputed and torch._C._current_graph_task_id() != -1:
            # A recomputation may stop before the siblings are called, in an engine thread that makes no further calls.
            torch.autograd.Variable._execution_engine.queue_callback(self.drop)  # type: ignore[attr-defined]

    def holds_for(self, x: Tensor, mode: Mode) -> bool:
        """Return whether these are the outputs for ``x`` in its current version, and for ``mode``."""
        return self.x is x and self.version == x._version and self.mode == mode

    def drop(self) -> None:
        """Release the outputs and the input."""
        self.x, self.outputs = None, {}


class UnclaimedOutputs(threading.local):
    """Per-thread cache of outputs computed for siblings that have not been called yet: those of one group.

    It is cleared by the call of the last sibling; by a call of a sibling with another input or in another mode; by the
    next group that runs in the thread; by any call in inference mode; and at the end of a backward that recomputed it.
    """

    made: GroupOutputs | None = None


unclaimed = UnclaimedOutputs()


def discard_unclaimed() -> None:
    """Drop cached sibling outputs."""
    made, unclaimed.made = unclaimed.made, None
    if made is not None:
        made.drop()
        if not made.recomputed:  # a recomputation may stop before it calls all siblings
            made.group.sharing.miss(made.partners)
