"""Runs the source of Gluon kernels for Hopper on a CPU: Gluon has no interpreter.

    with emulate(seed=3):
        gluon_extend(X, W, XA, B, None, config, units=2)     # the launcher itself, on CPU tensors

The functions under @gluon.jit are run as they stand, with `gl`, `tma`, `mbarrier` and the products replaced. All
programs of a launch are there at once; each partition of warp_specialize is a thread of its own. One runs at a time,
and the seed decides whose turn it is, so that a failure can be had again.

What it models, always at its worst (gluon_emulator_memory, _machine, _language, _engines):
  mbarriers      phases, parity, arrivals and expected bytes; a wait nobody ends is a deadlock, reported with lines
  TMA loads      the target is NaN from the issue on; they land in any order, as late as when nobody can go on otherwise
  TMA stores     read their source at the issue and when waited for (store_wait); NaN where it changed, or at the exit
  wgmma          reads its operands at the issue and when waited for; NaN where they changed, as its result is till then
  shared memory  NaN at first; what is put in one layout is NaN in another; what is stored through registers is NaN to
                 TMA and wgmma until fence_async_shared, and to other partitions until a barrier after it
  global memory  a store is NaN to other partitions until a barrier, a release and an acquire (vector clocks, carried by
                 atomics and mbarriers); bounds; no element is stored by two partitions; no TMA load of what was stored
What it cannot know: layouts and whether an instruction has them, registers, bank conflicts, speed; barriers inside of a
partition (its warps run in step; the compiler puts them in); clusters; int32 overflow of scalars.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.experimental.gluon import language as real_gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lora_kernels.testing.emulator.engines import Load, Store, warpgroup_mma, warpgroup_mma_wait
from lora_kernels.testing.emulator.language import Desc, Pointer, Tile, View
from lora_kernels.testing.emulator.machine import Machine, Partition, current
from lora_kernels.testing.emulator.memory import Barrier, Block, EmulatorError, Shared, merge


def _step(**kwargs: Any) -> Partition:
    me = current()
    me.machine.step(**kwargs)
    return me


def _allocate(dtype: torch.dtype, shape: Sequence[int], layout: Any) -> View:
    memory = Shared(current().block, dtype, list(shape))
    return View(memory, memory.values, memory.state, memory.tag, layout, None)


def _init(view: View, count: int) -> None:
    block, key = current().block, view.key
    block.barriers[key] = Barrier(f"mbarrier {key} of program {block.number}", count)


def _expect(view: View, nbytes: int, pred: bool = True) -> None:
    me = _step()
    if pred:
        view.barrier.bytes += nbytes
        view.barrier.arrive(1, me.clock)


def _arrive(view: View, *, count: int = 1, pred: bool = True) -> None:
    me = _step()
    if pred:
        view.barrier.arrive(count, me.clock)


def _wait(view: View, phase: int, pred: bool = True, deps: Sequence[View] = ()) -> None:
    barrier = view.barrier
    if pred:
        me = _step(ready=lambda: (barrier.phase & 1) != phase, waits_for=f"phase {phase} of {barrier.name}")
        merge(me.clock, barrier.clock)


def _load_box(desc: Desc, coord: Sequence[int], barrier: View, result: View, pred: bool = True) -> None:
    _step()
    if pred:
        Load(desc, coord, result, barrier.barrier)


def _store_box(desc: Desc, coord: Sequence[int], src: View) -> None:
    _step().stores.append(Store(desc, coord, src))


def _store_wait(pendings: int) -> None:
    me = _step()
    while len(me.stores) > pendings:
        me.stores.pop(0).finish()


def _fence_async_shared(cluster: bool = False) -> None:
    me = _step()
    me.block.of_partition(me.number, 1, -1)


def _barrier(**_: Any) -> None:
    me = _step()
    me.block.of_partition(me.number, -1, 0)
    me.clock[me.number] = me.stored


def _load(pointer: Pointer, mask: Tile | None = None, other: float = 0.0) -> Tile:
    me = _step()
    index = pointer.index
    if mask is None:
        return Tile(pointer.memory.load(index, me.number, me.clock))
    index, keep = torch.broadcast_tensors(index, mask.value)
    got = torch.full(index.shape, other, dtype=pointer.memory.flat.dtype)
    got[keep] = pointer.memory.load(index[keep], me.number, me.clock)
    return Tile(got)


def _store(pointer: Pointer, value: Tile, mask: Tile | None = None) -> None:
    me = _step()
    parts = [pointer.index, value.value, torch.tensor(True) if mask is None else mask.value]
    index, values, keep = torch.broadcast_tensors(*parts)
    me.stored += 1
    pointer.memory.store(index[keep], values[keep], me.number, me.stored)


def _atomic(change: Callable[[int, int], int], pointer: Pointer, value: int, sem: str = "acq_rel") -> int:
    me = current()
    word, place = pointer.memory.flat, int(pointer.index)
    pointer.memory.check(pointer.index)
    me.machine.step(spins=change(int(word[place]), value) == int(word[place]))
    old = int(word[place])
    word[place] = change(old, value)
    known = me.machine.releases.setdefault((word.data_ptr(), place), {})
    if sem in ("acquire", "acq_rel"):
        merge(me.clock, known)
    if sem in ("release", "acq_rel"):
        merge(known, me.clock)
    return old


def _warp_specialize(functions_and_args: Any, worker_num_warps: Any, worker_num_regs: Any = None) -> None:
    me = current()
    (default, default_args), *workers = functions_and_args
    parts = [
        Partition(me.machine, me.block, partial(run, *args), f"{run.__name__} of program {me.block.number}")
        for run, args in workers
    ]
    for part in parts:
        part.clock = dict(me.clock)
    default(*default_args)
    _step(ready=lambda: all(part.done for part in parts), waits_for="the other partitions")


def _where(mask: Tile, a: Tile, b: Tile | float) -> Tile:
    return Tile(torch.where(mask.value, a.value, b.value if isinstance(b, Tile) else b))


def _nothing(*_: Any, **__: Any) -> None:
    """Layouts: nothing here depends on them."""


GL = SimpleNamespace(
    int1=torch.bool, uint8=torch.uint8, int16=torch.int16, int32=torch.int32, int64=torch.int64,
    float16=torch.float16, bfloat16=torch.bfloat16, float32=torch.float32,
    program_id=lambda axis: current().block.number,
    num_programs=lambda axis: current().machine.programs,
    constexpr=lambda value: value, static_range=range, static_assert=_nothing,
    cdiv=lambda a, b: -(-a // b), minimum=min, maximum=max,
    cast=lambda x, dtype: x.to(dtype) if isinstance(x, Tile) else x,
    arange=lambda start, end, layout=None: Tile(torch.arange(start, end, dtype=torch.int32)),
    zeros=lambda shape, dtype, layout=None: Tile(torch.zeros(tuple(shape), dtype=dtype)),
    where=_where,
    convert_layout=lambda tile, layout, assert_trivial=False: tile,
    load=_load, store=_store, atomic_add=partial(_atomic, lambda a, b: a + b),
    atomic_xchg=partial(_atomic, lambda a, b: b), barrier=_barrier,
    allocate_shared_memory=_allocate, warp_specialize=_warp_specialize,
    SliceLayout=_nothing, BlockedLayout=_nothing, NVMMADistributedLayout=_nothing, NVMMASharedLayout=_nothing,
)  # fmt: skip
MBARRIER = SimpleNamespace(init=_init, expect=_expect, arrive=_arrive, wait=_wait, MBarrierLayout=_nothing)
LOAD_NAMES, STORE_NAMES = ("async_copy_global_to_shared", "async_load"), ("async_copy_shared_to_global", "async_store")
TMA = SimpleNamespace(store_wait=_store_wait)


def _replacements() -> dict[int, Any]:
    """By the identity of what Triton has: what stands for it here."""
    found: dict[int, Any] = {id(real_gl): GL, id(hopper.mbarrier): MBARRIER, id(hopper.tma): TMA}
    found |= {id(getattr(hopper.tma, name, None)): _load_box for name in LOAD_NAMES}
    found |= {id(getattr(hopper.tma, name, None)): _store_box for name in STORE_NAMES}
    found |= {id(getattr(real_gl, name, None)): _barrier for name in ("barrier", "thread_barrier")}
    found |= {id(hopper.warpgroup_mma): warpgroup_mma, id(hopper.warpgroup_mma_wait): warpgroup_mma_wait}
    found[id(hopper.fence_async_shared)] = _fence_async_shared
    found.pop(id(None), None)
    return found


def _as_python(kernel: GluonJITFunction[Any], worlds: dict[int, dict[str, Any]]) -> types.FunctionType:
    """The kernel's own code, seeing our modules in place of Triton's and plain functions in place of jit functions."""
    function = kernel.fn
    if id(function.__globals__) not in worlds:
        world = worlds[id(function.__globals__)] = dict(function.__globals__)
        ours = _replacements()
        for name, value in function.__globals__.items():
            if id(value) in ours:
                world[name] = ours[id(value)]
            elif isinstance(value, GluonJITFunction):
                world[name] = _as_python(value, worlds)
            elif isinstance(value, real_gl.constexpr):
                world[name] = value.value
    return types.FunctionType(
        function.__code__, worlds[id(function.__globals__)], function.__name__, function.__defaults__
    )


@contextmanager
def emulate(seed: int = 0) -> Iterator[list[str]]:
    """Within it a launch of a Gluon kernel runs here, to its end; yields the names of what was launched so far.

    Every seed is another order of events.

    Raises:
        EmulatorError: from a launch that deadlocks or does what the hardware does not define.
    """

    def run(kernel: GluonJITFunction[Any], *args: Any, grid: Sequence[int], warmup: bool, **kwargs: Any) -> None:
        machine, signature = Machine(seed), inspect.signature(kernel.fn)
        bound = signature.bind(*args, **{k: v for k, v in kwargs.items() if k in signature.parameters})

        def here(value: Any) -> Any:
            if isinstance(value, TensorDescriptor):
                return Desc(machine, value)
            return Pointer(machine.memory(value)) if isinstance(value, Tensor) else value

        given = {name: here(value) for name, value in bound.arguments.items()}
        machine.programs = math.prod(grid)
        body = _as_python(kernel, {})
        for number in range(machine.programs):
            Partition(machine, Block(number), partial(body, **given), f"program {number}")
        machine.start()
        launched.append(kernel.__name__)

    launched: list[str] = []
    with mock.patch.object(GluonJITFunction, "run", run):
        yield launched


__all__ = ["EmulatorError", "emulate"]
