"""The machine under testing/emulator: partitions that run one at a time, barriers, shared and global memory.

Everything asynchronous happens at the worst legal moment that the seed finds: a copy lands late and in any order, a
product and a store read their operands when they are issued and again when they are waited for, and are NaN where the
two differ. NaN is also what is read before it is written, visible to its reader, or in another layout than it was put.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_kernels.testing.emulator.memory import Block, Clock, EmulatorError, Global

QUIET_ROUNDS = 200  # turns in which nothing changes, before the rest is called a deadlock


class _StopError(BaseException):
    """Ends the other partitions after one has failed."""


def current() -> Partition:
    """The partition that has the turn."""
    thread = threading.current_thread()
    assert isinstance(thread, Partition)
    return thread


class Partition(threading.Thread):
    """A group of warps in step: one thread of ours, which runs only while it holds the turn."""

    def __init__(self, machine: Machine, block: Block, run: Callable[[], object], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.machine, self.block, self.body = machine, block, run
        self.number = len(machine.partitions)
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.waits_for = ""
        self.done = self.spins = False
        self.weight = 10 ** machine.random.uniform(-2, 2)
        self.products: list[Any] = []  # issued, not yet waited for; oldest first
        self.stores: list[Any] = []
        self.clock: Clock = {}
        self.stored = 0
        machine.partitions.append(self)

    def run(self) -> None:
        """The partition's body, from its first turn on."""
        self.turn.acquire()
        torch.set_grad_enabled(False)  # a thread starts with gradients on, and lands others' loads when it passes on
        try:
            if self.machine.error is None:
                self.body()
                for store in self.stores:
                    store.finish(lost=True)  # shared memory may be another block's by now
        except _StopError:
            pass
        except BaseException as error:  # handed to the launching thread
            self.machine.error = self.machine.error or error
        self.done = True
        self.machine.pass_on(self)

    def where(self) -> str:
        """The kernel's lines this partition stands in, innermost last."""
        frame, lines = sys._current_frames().get(self.ident or 0), []
        while frame:
            path = Path(frame.f_code.co_filename)
            if not path.name.startswith("gluon_emulator") and path.name != "threading.py":
                lines.append(f"{path.name}:{frame.f_lineno} {frame.f_code.co_name}")
            frame = frame.f_back
        return " > ".join(reversed(lines))


class Machine:
    """All partitions of a launch. ``random`` decides whose turn it is and when what is under way arrives."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.partitions: list[Partition] = []
        self.loads: list[Any] = []  # issued, not yet landed
        self.globals: dict[tuple[int, int], Global] = {}
        self.releases: dict[tuple[int, int], Clock] = {}  # what a word's last release made known
        self.error: BaseException | None = None
        self.finished = threading.Event()
        self.quiet = self.programs = 0
        self.eager = self.random.choice([0.0, 0.02, 0.3, 1.0])  # how soon a copy arrives of itself
        self.sticky = self.random.choice([0.0, 0.5, 0.9])  # how often a turn goes on

    def start(self) -> None:
        """Runs every partition to its end; raises what the first of them raised."""
        self.pass_on(None)
        self.finished.wait()
        for partition in self.partitions:
            if partition.ident is not None:
                partition.turn.release()
                partition.join()
        if self.error is not None:
            raise self.error
        if self.loads:
            raise EmulatorError(f"{len(self.loads)} copies were still under way when the kernel ended")

    def step(self, ready: Callable[[], bool] | None = None, waits_for: str = "", spins: bool = False) -> None:
        """A moment at which anybody may go on; returns when ``ready`` holds and it is this partition's turn."""
        me = current()
        me.ready, me.waits_for, me.spins = ready or (lambda: True), waits_for, spins
        self.quiet = self.quiet + 1 if spins else 0
        self.pass_on(me)
        if self.error is not None:
            raise _StopError

    def pass_on(self, me: Partition | None) -> None:
        """Gives the turn to whoever is to have it next, and waits for the next own one."""
        try:
            chosen = self._choose(me) if self.error is None else None
        except Exception as error:  # whatever it is: unreported it would leave every thread waiting
            self.error, chosen = error, None
        if chosen is me and me is not None:
            return
        if chosen is None:
            self.finished.set()
        else:
            if chosen.ident is None:
                chosen.start()
            chosen.turn.release()
        if me is not None and not me.done:
            me.turn.acquire()

    def _choose(self, me: Partition | None) -> Partition | None:
        for load in [load for load in self.loads if self.random.random() < self.eager]:
            load.land()
        while True:
            alive = [p for p in self.partitions if not p.done]
            able = [p for p in alive if p.ready()]
            busy = [p for p in able if not p.spins]
            if me in busy and self.random.random() < self.sticky:
                return me
            if busy or (able and not self.loads and self.quiet < QUIET_ROUNDS):
                among = busy if busy and self.random.random() < 0.9 else able
                return self.random.choices(among, [p.weight for p in among])[0]
            if not self.loads:
                if not alive:
                    return None
                lines = [f"  {p.name}: {p.waits_for or 'spins'} at {p.where()}" for p in alive]
                raise EmulatorError("deadlock: nobody can go on\n" + "\n".join(lines))
            self.random.choice(self.loads).land()

    def memory(self, tensor: Tensor) -> Global:
        """The global memory of a tensor, shared by all pointers to it."""
        key = tensor.data_ptr(), tensor.numel()
        if key not in self.globals:
            self.globals[key] = Global(tensor)
        return self.globals[key]
