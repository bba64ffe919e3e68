"""Which sibling layers read the same tensor: seen by identity in calls that run each layer alone.

What was seen changes how the layers run, and a forward must be recomputed as it ran: activation checkpointing draws the
same dropout masks again only if the same operators ask for them, and counts the tensors that they save. So the change
waits until nothing of what ran before can be recomputed any more.

    checkpoint(use_reentrant=False)   its saved-tensor hooks live as long as the recomputation can happen
    checkpoint(use_reentrant=True)    calls without gradients and with dropout, until as many have come in a backward
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
"""For each seat the seats, itself included, that read what it reads; empty where it reads alone."""

PATIENCE = 3  # rounds in which no two layers read one tensor, before nobody looks any more
MISSES = 2  # rounds running in which an output made ahead was not asked for, before what was learned is forgotten

_lock = fork_safe_lock()  # guards what is learned about all siblings of the program; held for a few microseconds
_top_hooks: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks  # type: ignore[attr-defined]


class _Call(NamedTuple):
    """A call of a layer: the tensor it read, in the state it had, and the seat that read it first."""

    x: weakref.ref[Tensor]
    version: int
    first: int

    def reads(self, x: Tensor, version: int) -> bool:
        return self.version == version and self.x() is x


class _Round(threading.local):
    """One thread's calls since each layer was last called, by seat; and the seats that read one tensor twice.

    Calls are noted only while partners are unknown. If another thread learns the partners during this thread's round,
    the calls of that round stay here, see Reads.pending.
    """

    def __init__(self) -> None:
        self.calls: dict[int, _Call] = {}
        self.last: int | None = None
        self.twice: set[int] = set()

    def clear(self) -> None:
        self.calls, self.last, self.twice = {}, None, set()


def in_backward() -> bool:
    """Whether a forward runs inside a backward: it is a recomputation."""
    if torch._C._current_graph_task_id() != -1:
        return True
    hooks = _top_hooks(False)  # a saved tensor may be asked for outside a backward, too
    return hooks is not None and getattr(hooks[0], "__qualname__", "").startswith("_recomputation_hook")


class Reads:
    """What is known of ``count`` siblings. ``partners`` is None until it is learned. Not copied with a model: a copy is
    given ``partners`` alone, since nothing of it has run."""

    def __init__(self, count: int, partners: Partners | None = None) -> None:
        self.count, self.partners = count, partners
        self.rounds = self.misses = 0
        self._hooks: list[weakref.ref[Any]] = []  # of calls that may be recomputed
        self._unmatched = 0  # calls that reentrant checkpointing may recompute
        self._round = _Round()

    def observe(self, seat: int, x: Tensor, dropout: bool) -> Partners | None:
        """Note a call; what was learned, from the call on that begins a new round."""
        with _lock:  # no other thread may learn between this note and the call that it is about
            seen = self._round
            if not in_backward() and not x.is_inference():
                version = x._version
                before = seen.calls.get(seat)
                if before is not None and seen.last == seat and before.reads(x, version):
                    seen.twice.add(seat)  # the cached output would be used up at the second call
                elif before is not None:
                    self._close(seen)
                if self.partners is None:
                    first = next((call.first for call in seen.calls.values() if call.reads(x, version)), seat)
                    seen.calls[seat], seen.last = _Call(weakref.ref(x), version, first), seat
            if self.partners is None:
                self._ran(dropout)
            return self.partners

    def pending(self, seat: int, seats: tuple[int, ...], x: Tensor) -> tuple[int, ...]:
        """The ``seats`` that this thread has not called with ``x`` yet: all of them, unless another thread learned the
        partners during this thread's round. An output for a layer that was already called would never be used."""
        calls = self._round.calls
        if not calls:
            return seats
        if seat in calls:  # a new round
            self._round.clear()
            return seats
        return tuple(i for i in seats if i not in calls or not calls[i].reads(x, x._version))

    def _close(self, seen: _Round) -> None:
        """A layer is called again: of the round before it is known who read what."""
        same = defaultdict[int, list[int]](list)
        for seat, call in seen.calls.items():
            if seat not in seen.twice:
                same[call.first].append(seat)
        found: list[tuple[int, ...]] = [()] * self.count
        for seats in same.values():
            for seat in seats if len(seats) > 1 else ():
                found[seat] = tuple(sorted(seats))
        seen.clear()
        if not any(found):
            self.rounds += 1
        if self.partners is None and (any(found) or self.rounds >= PATIENCE) and self._settled():
            self.partners = tuple(found)

    def begin(self, partners: Partners, dropout: bool) -> bool:
        """Note that a call for ``partners`` runs now; False if another thread has deleted these partners since."""
        with _lock:
            if self.partners is partners:
                self._ran(dropout)
                return True
            return False

    def _ran(self, dropout: bool) -> None:
        """Note that a call runs now, in the way known now, which may have to be repeated."""
        hooks = _top_hooks(False)
        if in_backward():
            if hooks is None and self._unmatched:
                self._unmatched -= 1
        elif hooks is not None:
            held = weakref.ref(hooks[1])  # a saved tensor keeps the hook that restores it, until backward is through
            if held not in self._hooks:
                self._hooks = [*(ref for ref in self._hooks if ref() is not None), held]
        elif dropout and not torch.is_grad_enabled():
            self._unmatched += 1

    def complete(self) -> None:
        """Note that all outputs of a round were asked for."""
        self.misses = 0

    def miss(self, partners: Partners) -> None:
        """Note that outputs of a round made for ``partners`` were not; twice running, and they are forgotten."""
        with _lock:
            if self.partners is not partners:
                return
            self.misses += 1
            if self.misses >= MISSES and self._settled():
                self.misses = 0
                self.rounds += 1
                self.partners = None if self.rounds < PATIENCE else ((),) * self.count

    def _settled(self) -> bool:
        """Whether nothing that ran before can be recomputed."""
        self._hooks = [ref for ref in self._hooks if ref() is not None]
        return not self._hooks and not self._unmatched
