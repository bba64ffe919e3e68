"""AdapterPool as a server uses it: loads, evictions, pins and batches, each row judged against its adapter alone."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import lora_kernels as lk
from tests.pool.pools import X, fill


def test_each_sequence_gets_its_adapter(model: nn.Module, pool: lk.AdapterPool, served: Any, adapter: Any) -> None:
    made = fill(pool, adapter, 2, 5, 3)
    names = ["b", None, "a", "c"]
    with torch.no_grad(), pool.batch(names):
        served.check(model(X), X, [made[name] for name in names])
    twice = [name for name in names for _ in "12"]
    with torch.no_grad(), pool.batch(twice):
        served.check(model(X.repeat_interleave(2, 0)), X.repeat_interleave(2, 0), [made[name] for name in twice])
    with torch.no_grad():
        assert torch.equal(model(X), served.alone(X, None, X.dtype))  # no batch is open


def test_ids_are_one_a_sequence_or_one_a_token_and_may_change(
    model: nn.Module, pool: lk.AdapterPool, served: Any, adapter: Any
) -> None:
    made = fill(pool, adapter, 2, 5, 3)
    static = torch.full((12,), -1, dtype=torch.int32)
    tokens = X.reshape(1, 12, 8)
    with torch.no_grad(), pool.batch(static):
        assert torch.equal(model(tokens), served.alone(tokens, None, X.dtype))
        for names in (["a", "b", None] * 4, ["c"] * 5 + [None] * 7):
            assert pool.ids(names, out=static) is static
            served.check(model(tokens)[0], tokens[0], [made[name] for name in names])
        pool.ids(["a"], out=static)
        assert static.tolist() == [pool.info("a").slot] + [-1] * 11
    with torch.no_grad(), pool.batch(pool.ids(["c", "a", "b", None])):
        served.check(model(X), X, [made[name] for name in ("c", "a", "b", None)])
    with torch.no_grad(), pool.batch(pool.ids(["c", None, "b"] * 4).view(4, 3)):
        served.check(model(X).flatten(0, 1), X.flatten(0, 1), [made[name] for name in ["c", None, "b"] * 4])


def test_batches_nest_and_end_where_they_began(
    model: nn.Module, pool: lk.AdapterPool, served: Any, adapter: Any
) -> None:
    made = fill(pool, adapter, 2, 5)
    with torch.no_grad(), pool.batch(["a"]):
        with pool.batch(["b"]):
            served.check(model(X), X, [made["b"]] * 4)
            assert (pool.info("a").batches, pool.info("b").batches) == (1, 1)
        served.check(model(X), X, [made["a"]] * 4)
        with pool.batch([None] * 3):  # of no matter how many rows
            assert torch.equal(model(X), served.alone(X, None, X.dtype))
        with pytest.raises(ValueError, match="mine"), pool.batch(["a", "b"]):
            raise ValueError("mine")
        served.check(model(X), X, [made["a"]] * 4)
        assert (pool.info("a").batches, pool.info("b").batches) == (1, 0)
    assert pool.info("a").batches == 0


def test_a_replaced_adapter_keeps_slot_and_buffers(
    model: nn.Module, pool: lk.AdapterPool, served: Any, adapter: Any
) -> None:
    made = fill(pool, adapter, 2, 3)
    slot, before = pool.info("a").slot, {name: b.data_ptr() for name, b in model.named_buffers()}
    pool.pin("a")
    for rank in (1, 7, 9, 2):
        made["a"] = adapter(10 + rank, rank, ("v",) if rank == 9 else ("q", "v"))
        assert pool.load("a", made["a"].tensors, made["a"].config) == slot
        assert pool.info("a").pinned
        with torch.no_grad(), pool.batch(["a", "b", None, "a"]):
            served.check(model(X), X, [made[name] for name in ("a", "b", None, "a")])
    assert {name: b.data_ptr() for name, b in model.named_buffers()} == before
    assert pool.names == ("b", "a")  # the batch named a last


def test_the_least_recently_used_gives_way(pool: lk.AdapterPool, adapter: Any) -> None:
    fill(pool, adapter, 2, 2, 2)
    assert (pool.names, len(pool), "a" in pool) == (("a", "b", "c"), 3, True)
    with pool.batch(["a"]):
        assert pool.names == ("b", "c", "a")
    pool.pin("b")
    slot = pool.info("c").slot
    four = adapter(9, 2)
    assert pool.load("d", four.tensors, four.config) == slot
    assert pool.names == ("b", "a", "d")
    pool.unpin("b")
    pool.ids(["a", None])
    large = adapter(8, 9)  # its ranks need two to go, and both slots are there already
    pool.load("e", large.tensors, large.config)
    assert pool.names == ("a", "e")


def test_only_those_go_whose_going_helps(pool: lk.AdapterPool, adapter: Any) -> None:
    fill(pool, adapter, 1, 8, 2)
    large = adapter(8, 7)
    pool.load("large", large.tensors, large.config)
    assert pool.names == ("a", "c", "large")


def test_rows_move_together_when_gaps_are_too_small(model: nn.Module, served: Any, adapter: Any) -> None:
    pool = lk.AdapterPool(model, capacity=4, max_rank_total=12)
    made = fill(pool, adapter, 3, 3, 3, 3)
    pool.evict("a")
    pool.evict("c")
    made["e"] = adapter(7, 6)
    with pool.batch(["d"]):  # d stays where it is, and b may go down: 3 + 3 rows are free in one run
        starts = [layer.pool_starts.clone() for layer in model.modules() if hasattr(layer, "pool_starts")]
        pool.load("e", made["e"].tensors, made["e"].config)
        for layer, before in zip((m for m in model.modules() if hasattr(m, "pool_starts")), starts, strict=True):
            assert layer.pool_starts[pool.info("d").slot] == before[pool.info("d").slot] == 9
            assert layer.pool_starts[pool.info("b").slot] == 0
    names = ["e", "b", "d", None]
    with torch.no_grad(), pool.batch(names):
        served.check(model(X), X, [made[name] for name in names])


def test_a_slot_in_use_is_neither_evicted_nor_overwritten_nor_moved(pool: lk.AdapterPool, adapter: Any) -> None:
    fill(pool, adapter, 4, 4, 4)
    one = adapter(6, 4)
    pool.evict("a")
    pool.evict("b")
    two = adapter(5, 2)
    pool.load("b", two.tensors, two.config)  # rows 0 and 1, c has 8 to 11
    with pool.batch(["c"]):
        with pytest.raises(
            lk.AdapterBusyError, match="'c' is used by 1 running batch; replace it once they have ended"
        ):
            pool.load("c", one.tensors, one.config)
        with pool.batch(["c"]), pytest.raises(lk.AdapterBusyError, match="2 running batches; evict it"):
            pool.evict("c")
        with pytest.raises(lk.AdapterBusyError, match="1 batches or loads are running; close the pool"):
            pool.close()
        pool.load("d", one.tensors, one.config)
        with pytest.raises(lk.PoolFullError, match=r"in use by running batches \['c'\]"):
            pool.load("e", adapter(4, 9).tensors, adapter(4, 9).config)
    pool.load("e", adapter(4, 9).tensors, adapter(4, 9).config)


def test_a_tensor_batch_holds_what_is_loaded_and_what_ids_is_asked_for(pool: lk.AdapterPool, adapter: Any) -> None:
    made = fill(pool, adapter, 2, 2)
    with pool.batch(torch.tensor([-1, 0], dtype=torch.int32)):
        assert (pool.info("a").batches, pool.info("b").batches) == (1, 1)
        pool.load("late", made["a"].tensors, made["a"].config)
        assert pool.info("late").batches == 0
        pool.load("late", made["b"].tensors, made["b"].config)
        pool.ids(["late", "late", "a"])
        assert (pool.info("late").batches, pool.info("a").batches) == (1, 1)
        with pytest.raises(lk.AdapterBusyError, match="late"):
            pool.evict("late")
    assert not any(pool.info(name).batches for name in pool.names)


def test_repr_says_what_is_where(pool: lk.AdapterPool, adapter: Any) -> None:
    assert "\n" not in repr(pool)
    fill(pool, adapter, 2, 5)
    pool.pin("a")
    with pool.batch(["a", "b"]), pool.batch(["a"]):
        first, *lines = repr(pool).splitlines()
    assert re.fullmatch(
        r"AdapterPool\(Served, 4 layers, 2 of 3 slots, 7 of 12 ranks, up to 12 each, float32 on cpu, 0\.\d MiB\)", first
    )
    assert [line.split() for line in lines] == [
        ["slot", "name", "rank", "layers", "state"],
        ["1", "b", "5", "4", "in", "1", "batch"],
        ["0", "a", "2", "4", "pinned,", "in", "2", "batches"],
    ]
    assert pool.left_out == {}
