"""What is open where: contexts, copies, generators."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Iterator
from contextvars import copy_context
from typing import Any

import pytest

from lora_kernels.errors import AdapterPoolError
from lora_kernels.pool.active import ActiveBatch, Refusing, running


class Batch:
    def __init__(self, outer: Any = None, frame: Any = None) -> None:
        self.outer, self.frame = outer, frame


def test_a_context_has_its_own() -> None:
    active = ActiveBatch()
    context = copy_context()
    context.run(active.var.set, 1)
    assert active.get() is None
    assert context.run(active.get) == 1


def test_copies_of_a_model_share_it_and_pickles_have_none() -> None:
    active = ActiveBatch()
    assert copy.deepcopy(active) is active
    active.var.set(1)
    assert pickle.loads(pickle.dumps(active)).get() is None


def test_running() -> None:
    def steps() -> Iterator[bool]:
        while True:
            yield running(frame)

    frame = sys._getframe()
    assert running(frame)
    generator: Any = steps()
    assert next(generator)
    frame = generator.gi_frame
    assert next(generator)
    assert not running(frame)


def test_a_generators_batch_counts_inside_the_generator() -> None:
    active = ActiveBatch()

    def steps() -> Any:
        while True:
            active.check_generator(current)
            yield

    current: Any = None
    generator: Any = steps()
    next(generator)
    mine = Batch(frame=generator.gi_frame)
    active.generators[generator.gi_frame] = mine  # type: ignore[assignment]
    active.check_generator(None)  # another thread
    with pytest.raises(AdapterPoolError, match="outside of the generator"):
        active.check_generator(mine)
    for inside in (mine, Batch(outer=mine)):
        current = inside
        next(generator)
    for outside in (None, Batch()):
        current, other = outside, steps()
        active.generators[other.gi_frame] = mine  # type: ignore
        with pytest.raises(AdapterPoolError, match="resumed in another thread or task"):
            next(other)


def test_refusing() -> None:
    with pytest.raises(AdapterPoolError, match="why"):
        assert "path" in Refusing("why")
