"""Blocks of use_backend: nested ones, and those of tasks, threads and generators."""

import asyncio
import contextvars
import os
import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels.errors import ConfigError
from lora_kernels.planning import override

OVERLAP = "overlap in one thread or task"


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert override.latest is None
    assert override._open == []
    assert override.requested() == "auto"


def turns(name, seen):
    with lk.use_backend(name):
        while True:
            seen.append(override.requested())
            yield


def test_nested():
    with lk.use_backend("reference"):
        with lk.use_backend("auto"):
            assert override.requested() == "auto"
            with lk.use_backend("triton"):
                assert override.requested() == override.latest == "triton"
        assert override.requested() == override.latest == "reference"


def test_generators_that_take_turns_are_refused_and_leave_nothing():
    one, other, seen = turns("reference", []), turns("triton", []), []
    next(one)
    next(other)
    with pytest.raises(ConfigError, match=OVERLAP):
        one.close()
    assert override.requested() == "auto"
    with pytest.raises(ConfigError, match=OVERLAP):
        other.close()
    with lk.use_backend("reference"):
        assert override.requested() == "reference"
    assert seen == []


def test_an_overlap_inside_of_a_block_ends_the_overlapping_ones_alone():
    with lk.use_backend("reference"):
        one, other = turns("triton", []), turns("triton:eager", [])
        next(one)
        next(other)
        with pytest.raises(ConfigError, match=OVERLAP):
            one.close()
        assert override.requested() == "reference"
        with pytest.raises(ConfigError, match=OVERLAP):
            other.close()
        assert override.requested() == "reference"


def test_generators_one_after_the_other_and_nested():
    for names in (("reference", "triton"), ("triton", "reference")):
        seen = []
        one, other = (turns(name, seen) for name in names)
        next(one)
        next(other)
        other.close()
        next(one)
        one.close()
        assert seen == [names[0], names[1], names[0]]


def test_an_exception_beside_an_overlap():
    def fails():
        with lk.use_backend("reference"):
            yield
            raise ZeroDivisionError

    one, other = fails(), turns("triton", [])
    next(one)
    next(other)
    with pytest.raises(ConfigError, match=OVERLAP) as caught:
        next(one)
    assert isinstance(caught.value.__context__, ZeroDivisionError)
    with pytest.raises(ConfigError, match=OVERLAP):
        other.close()


def test_a_generator_that_is_dropped_ends_its_block():
    one = turns("reference", [])
    next(one)
    del one
    assert override.requested() == "auto"


def test_tasks_that_overlap_have_each_their_own():
    async def work(name, first, second):
        with lk.use_backend(name):
            first.set()
            await second.wait()
            assert override.requested() == name
            await asyncio.sleep(0)
            assert override.requested() == name
        assert override.requested() == "auto"

    async def main():
        events = [asyncio.Event(), asyncio.Event()]
        await asyncio.gather(work("reference", *events), work("triton", *reversed(events)))
        assert override.requested() == "auto"

    asyncio.run(main())


def test_a_task_made_inside_has_the_block_until_it_ends():
    async def child(go_on, seen):
        seen.append(override.requested())
        await go_on.wait()
        seen.append(override.requested())
        with lk.use_backend("triton"):
            seen.append(override.requested())

    async def main():
        go_on, seen = asyncio.Event(), []
        with lk.use_backend("reference"):
            task = asyncio.create_task(child(go_on, seen))
            await asyncio.sleep(0)
        go_on.set()
        await task
        assert seen == ["reference", "auto", "triton"]

    asyncio.run(main())


def test_a_task_whose_own_block_outlives_the_one_it_was_made_in():
    async def child(entered, go_on, seen):
        with lk.use_backend("triton"):
            entered.set()
            await go_on.wait()
            seen.append(override.requested())
        seen.append(override.requested())

    async def main():
        entered, go_on, seen = asyncio.Event(), asyncio.Event(), []
        with lk.use_backend("reference"):
            task = asyncio.create_task(child(entered, go_on, seen))
            await entered.wait()
            assert override.requested() == "reference"
        go_on.set()
        await task
        assert seen == ["triton", "auto"]

    asyncio.run(main())


def test_threads_that_overlap_have_each_their_own_and_start_with_the_default():
    entered, left, seen = threading.Event(), threading.Event(), []

    def work():
        seen.append(override.requested())
        with lk.use_backend("triton"):
            entered.set()
            assert left.wait(600)
            seen.append(override.requested())
        seen.append(override.requested())

    thread = threading.Thread(target=work)
    with lk.use_backend("reference"):
        thread.start()
        assert entered.wait(600)
        assert override.requested() == "reference"
    assert override.requested() == "auto"
    left.set()
    thread.join()
    assert seen == ["auto", "triton", "auto"]


def test_a_block_that_is_left_in_another_context():
    one = turns("reference", [])
    contextvars.copy_context().run(next, one)
    assert override.requested() == "auto"
    one.close()


def test_a_graph_is_made_again_where_the_block_changes():
    layer, counter = lk.LoRALinear(8, 6, r=2), CompileCounter()
    compiled, x = torch.compile(layer, backend=counter, fullgraph=True), torch.zeros(2, 8)
    compiled(x)
    with lk.use_backend("reference"):
        compiled(x)
    compiled(x)
    assert counter.frame_count == 2


def test_a_block_inside_of_a_graph():
    layer = lk.LoRALinear(8, 6, r=2)

    def within(x):
        with lk.use_backend("reference"):
            return layer(x)

    torch.compile(within, backend="eager", fullgraph=True)(torch.zeros(2, 8))


def test_a_recomputation_in_the_thread_that_calls_backward():
    seen = []

    def body(x):
        seen.append(override.requested())
        return x.sin()

    with lk.use_backend("reference"):
        y = checkpoint(body, torch.ones(2, requires_grad=True), use_reentrant=False).sum()
        y.backward()
    assert seen == ["reference"] * 2


def test_a_thread_of_the_engine_takes_the_block_entered_last(monkeypatch):
    seen = []
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 1)

    def work(kind):
        seen.append((kind, override.requested()))

    with lk.use_backend("reference"):
        thread = threading.Thread(target=work, args=("started by Python",))
        thread.start()
        thread.join()
        monkeypatch.setattr(threading, "current_thread", lambda: threading._DummyThread.__new__(threading._DummyThread))
        contextvars.Context().run(work, "of the engine")
    assert seen == [("started by Python", "auto"), ("of the engine", "reference")]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_has_the_blocks_of_the_thread_that_forked():
    entered, left = threading.Event(), threading.Event()

    def work():
        with lk.use_backend("triton"):
            entered.set()
            assert left.wait(600)

    with lk.use_backend("reference"):
        thread = threading.Thread(target=work)
        thread.start()
        assert entered.wait(600)
        pid = os.fork()
        if pid == 0:
            os._exit(0 if override.latest == override.requested() == "reference" and len(override._open) == 1 else 1)
        left.set()
        thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
