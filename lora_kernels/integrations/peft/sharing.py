"""Detects which sibling layers read the same tensor, by the tensor's identity in calls that run each layer alone.

The result changes how the layers run, and a forward must be recomputed as it ran: activation checkpointing draws the
same dropout masks again only if the same operators request them, and it counts the tensors that they save. So the
change is delayed until no earlier forward can be recomputed. A forward can be recomputed

    checkpoint(use_reentrant=False)   while the saved-tensor hooks of the call are alive
    checkpoint(use_reentrant=True)    after calls without gradients and with dropout, until a backward has made as many
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.locks import fork_safe_lock

Partners = tuple[tuple[int, ...], ...]
"""For each member the indices of the members, itself included, that read the same tensor; empty for a lone reader."""

MAX_ROUNDS_WITHOUT_SHARING = 3  # rounds in which no two layers read one tensor; then the detector stops
MAX_UNCLAIMED_ROUNDS = 2  # consecutive rounds with an unclaimed output; then the partners are reset to unknown

_lock = fork_safe_lock()  # one lock for all detectors of the process; held for a few microseconds
_top_hooks: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks  # type: ignore[attr-defined]


class _Call(NamedTuple):
    """A call of a layer: the tensor, its version, and the index of the layer that read it first in this round."""

    x: weakref.ref[Tensor]
    version: int
    first: int

    def read(self, x: Tensor, version: int) -> bool:
        return self.version == version and self.x() is x


class _Round(threading.local):
    """Hold one thread's latest call of each layer, by index, and the layers that read one tensor twice.

    Calls are recorded only while the partners are unknown. If another thread finds the partners during this thread's
    round, the calls of that round stay here; see SharingDetector.pending.
    """

    def __init__(self) -> None:
        self.calls: dict[int, _Call] = {}
        self.last: int | None = None
        self.twice: set[int] = set()

    def clear(self) -> None:
        self.calls, self.last, self.twice = {}, None, set()


def in_backward() -> bool:
    """Return whether a forward that runs now is a recomputation."""
    if torch._C._current_graph_task_id() != -1:
        return True
    hooks = _top_hooks(False)  # saved tensors can be unpacked outside a backward, too
    return hooks is not None and getattr(hooks[0], "__qualname__", "").startswith("_recomputation_hook")


class SharingDetector:
    """Find the partners of ``count`` siblings. ``partners`` is None while they are unknown.

    A copy of the model gets a new detector with the same ``partners``: none of its forwards can be recomputed.
    """

    def __init__(self, count: int, partners: Partners | None = None) -> None:
        self.count, self.partners = count, partners
        self.rounds = self.misses = 0
        self._hooks: list[weakref.ref[Any]] = []  # of calls that may be recomputed
        self._unmatched = 0  # calls that reentrant checkpointing may recompute
        self._round = _Round()

    def observe(self, index: int, x: Tensor, dropout: bool) -> Partners | None:
        """Record a call and return the partners; None, at least until the call that begins the second round."""
        with _lock:  # no other thread may set partners between this record and its call
            seen = self._round
            if not in_backward() and not x.is_inference():
                version = x._version
                before = seen.calls.get(index)
                if before is not None and seen.last == index and before.read(x, version):
                    seen.twice.add(index)  # the cached output would be used up at the second call
                elif before is not None:
                    self._close(seen)
                if self.partners is None:
                    first = next((call.first for call in seen.calls.values() if call.read(x, version)), index)
                    seen.calls[index], seen.last = _Call(weakref.ref(x), version, first), index
            if self.partners is None:
                self._ran(dropout)
            return self.partners

    def pending(self, index: int, indices: tuple[int, ...], x: Tensor) -> tuple[int, ...]:
        """Return those of ``indices`` that this thread has not called with ``x`` in this round.

        Returns all of them, unless another thread found the partners during this thread's round: then the output for a
        layer that was already called would never be used.
        """
        calls = self._round.calls
        if not calls:
            return indices
        if index in calls:  # a new round
            self._round.clear()
            return indices
        return tuple(i for i in indices if i not in calls or not calls[i].read(x, x._version))

    def _close(self, seen: _Round) -> None:
        """End a round, because a layer is called again: set the partners if they are found or the search is over."""
        same = defaultdict[int, list[int]](list)
        for index, call in seen.calls.items():
            if index not in seen.twice:
                same[call.first].append(index)
        found: list[tuple[int, ...]] = [()] * self.count
        for indices in same.values():
            for index in indices if len(indices) > 1 else ():
                found[index] = tuple(sorted(indices))
        seen.clear()
        if not any(found):
            self.rounds += 1
        if self.partners is None and (any(found) or self.rounds >= MAX_ROUNDS_WITHOUT_SHARING) and self._settled():
            self.partners = tuple(found)

    def begin(self, partners: Partners, dropout: bool) -> bool:
        """Record that a call for ``partners`` runs now. Return False if another thread has replaced these partners."""
        with _lock:
            if self.partners is partners:
                self._ran(dropout)
                return True
            return False

    def _ran(self, dropout: bool) -> None:
        """Record that a call runs now with the present partners, and may be recomputed with them."""
        hooks = _top_hooks(False)
        if in_backward():
            if hooks is None and self._unmatched:
                self._unmatched -= 1
        elif hooks is not None:
            held = weakref.ref(hooks[1])  # a saved tensor holds its unpack hook until the backward has ended
            if held not in self._hooks:
                self._hooks = [*(ref for ref in self._hooks if ref() is not None), held]
        elif dropout and not torch.is_grad_enabled():
            self._unmatched += 1

    def complete(self) -> None:
        """Record that all outputs of a round were claimed."""
        self.misses = 0

    def miss(self, partners: Partners) -> None:
        """Record a round for ``partners`` with an unclaimed output; reset them after MAX_UNCLAIMED_ROUNDS in a row."""
        with _lock:
            if self.partners is not partners:
                return
            self.misses += 1
            if self.misses >= MAX_UNCLAIMED_ROUNDS and self._settled():
                self.misses = 0
                self.rounds += 1
                self.partners = None if self.rounds < MAX_ROUNDS_WITHOUT_SHARING else ((),) * self.count

    def _settled(self) -> bool:
        """Return whether no earlier forward can be recomputed."""
        self._hooks = [ref for ref in self._hooks if ref() is not None]
        return not self._hooks and not self._unmatched
