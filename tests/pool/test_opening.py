"""Batches begin and end in order: threads, tasks and generators each get their own adapters, or an error."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_kernels as lk
from tests.pool.pools import X, fill

MIXES: list[list[Any]] = [["a"] * 4, ["b", None, "a", "a"], ["b"] * 4, [None] * 4]


@pytest.fixture
def made(pool: lk.AdapterPool, adapter: Any) -> Any:
    torch.set_grad_enabled(False)
    yield fill(pool, adapter, 2, 5)
    torch.set_grad_enabled(True)


def nothing_is_open(model: nn.Module, pool: lk.AdapterPool, served: Any) -> None:
    assert torch.equal(model(X), served.alone(X, None, X.dtype))
    assert not any(pool.info(name).batches for name in pool.names)
    pool.close()


def test_tasks_of_one_event_loop(model: nn.Module, pool: lk.AdapterPool, served: Any, made: Any) -> None:
    async def task(names: list[Any]) -> None:
        with pool.batch(names):
            for _ in range(3):
                await asyncio.sleep(0)
                served.check(model(X), X, [made[name] for name in names])
                served.check(await asyncio.to_thread(model, X), X, [made[name] for name in names])
        assert torch.equal(model(X), served.alone(X, None, X.dtype))

    async def all_of_them() -> None:
        await asyncio.gather(*map(task, MIXES))

    asyncio.run(all_of_them())
    nothing_is_open(model, pool, served)


def test_a_task_that_outlives_the_batch_it_began_in(
    model: nn.Module, pool: lk.AdapterPool, served: Any, made: Any
) -> None:
    async def late() -> Tensor:
        await asyncio.sleep(0)
        return model(X)

    async def run() -> None:
        with pool.batch(["a"] * 4):
            task = asyncio.create_task(late())
        with pytest.raises(lk.AdapterPoolError, match="has ended"):
            await task

    asyncio.run(run())
    nothing_is_open(model, pool, served)


def test_generators(model: nn.Module, pool: lk.AdapterPool, served: Any, made: Any) -> None:
    def answers(names: list[Any]) -> Iterator[Tensor]:
        with pool.batch(names):
            yield model(X)
            with pool.batch(MIXES[1]):
                yield model(X)
            yield model(X)

    first = answers(["a"] * 4)
    served.check(next(first), X, [made["a"]] * 4)
    with pytest.raises(lk.AdapterPoolError, match="outside of the generator"):
        model(X)
    with pytest.raises(lk.AdapterPoolError, match="a suspended generator has a batch open"):
        next(answers(["b"] * 4))
    served.check(next(first), X, [made[name] for name in MIXES[1]])
    served.check(next(first), X, [made["a"]] * 4)
    assert list(first) == []
    with pool.batch(["b"] * 4):
        second = answers(["a"] * 4)
        served.check(next(second), X, [made["a"]] * 4)
        with pytest.raises(lk.AdapterPoolError, match="outside of the generator"):
            model(X)
        second.close()
        served.check(model(X), X, [made["b"]] * 4)
    nothing_is_open(model, pool, served)


def test_a_generator_that_another_thread_resumes(model: nn.Module, pool: lk.AdapterPool, made: Any) -> None:
    def answers() -> Iterator[Tensor]:
        with pool.batch(["a"] * 4):
            while True:
                yield model(X)

    generator, said = answers(), list[str]()
    next(generator)

    def resume() -> None:
        try:
            next(generator)
        except lk.AdapterPoolError as error:
            said.extend((str(error), str(error.__context__)))

    thread = threading.Thread(target=resume)
    thread.start()
    thread.join()
    assert "ended in another thread or task" in said[0]
    assert "resumed in another thread or task" in said[1]
    assert pool.info("a").batches == 0


def test_context_managers_around_a_batch(model: nn.Module, pool: lk.AdapterPool, served: Any, made: Any) -> None:
    @contextlib.contextmanager
    def serving(names: list[Any]) -> Iterator[None]:
        with pool.batch(names):
            yield

    with contextlib.ExitStack() as stack:
        stack.enter_context(serving(MIXES[0]))
        served.check(model(X), X, [made[name] for name in MIXES[0]])
        with serving(MIXES[2]), pool.batch(MIXES[1]):
            served.check(model(X), X, [made[name] for name in MIXES[1]])
    nothing_is_open(model, pool, served)


def test_batches_that_overlap(model: nn.Module, pool: lk.AdapterPool, served: Any, made: Any) -> None:
    first, second, third = (pool.batch(names) for names in MIXES[:3])
    for batch in (first, second, third):
        batch.__enter__()
    with pytest.raises(lk.AdapterPoolError, match="overlap"):
        first.__exit__(None, None, None)
    assert pool.info("a").batches == 1
    for batch in (third, second):
        with pytest.raises(lk.AdapterPoolError, match="overlap"):
            model(X)
        batch.__exit__(None, None, None)
    with pytest.raises(lk.AdapterPoolError, match=r"call pool\.batch again"):
        first.__enter__()
    nothing_is_open(model, pool, served)


def test_ids_that_change_without_a_version(model: nn.Module, pool: lk.AdapterPool, served: Any, made: Any) -> None:
    static = pool.ids(["a", "b", None, "a"])
    with pool.batch(static):
        for names in (MIXES[1], MIXES[0], ["b", "a", "a", None]):
            slots = [-1 if name is None else pool.info(name).slot for name in names]
            static.numpy()[:] = slots
            served.check(model(X), X, [made[name] for name in names])
            static.data.fill_(-1)
            assert torch.equal(model(X), served.alone(X, None, X.dtype))
    nothing_is_open(model, pool, served)


def test_compiled_graphs_read_the_callers_ids(model: nn.Module, pool: lk.AdapterPool, served: Any, made: Any) -> None:
    pool.probe(X)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    static = pool.ids(["a", "b", None, "a"])
    with pool.batch(static):
        served.check(model(X), X, [made[name] for name in ("a", "b", None, "a")])
        for names in (["a", "b", None, "a"], MIXES[0], ["b", "a", "a", None]):
            pool.ids(names, out=static)
            served.check(compiled(X), X, [made[name] for name in names])


@pytest.mark.parametrize("factor", [0.5, -2, 1, 0, 0.0])
def test_a_scale_for_each_request(
    model: nn.Module, pool: lk.AdapterPool, served: Any, adapter: Any, made: Any, factor: float
) -> None:
    scaled = adapter(1, 5)
    scaled.scaling *= factor
    with pool.batch(["b", ("b", factor), None, ("a", 1.0)]):
        served.check(model(X), X, [made["b"], scaled, None, made["a"]])
        assert (pool.info("b").batches, pool.info("a").batches) == (1, 1)
    with pool.batch([("b", factor)]):
        served.check(model(X), X, [scaled] * 4)
    nothing_is_open(model, pool, served)


@pytest.mark.parametrize(
    "one", [("a", float("nan")), ("a", float("inf")), ("a", "2"), ("a", True), ("a",), (None, 2.0), ("a", 1e39)]
)
def test_scales_that_are_refused(pool: lk.AdapterPool, made: Any, one: Any) -> None:
    with pytest.raises(lk.AdapterPoolError, match=r"finite scale|is infinite"):
        pool.batch([one, None]).__enter__()
    with pytest.raises(lk.UnknownAdapterError, match="no adapter 'x'"):
        pool.batch([("x", 2.0)]).__enter__()
    assert not any(pool.info(name).batches for name in pool.names)
