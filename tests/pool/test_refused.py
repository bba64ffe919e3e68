"""What AdapterPool refuses, and that it leaves every bit as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.pool import write as pool_write
from lora_kernels.pool.layer import _Pooled
from tests.pool.pools import X, fill


def test_a_load_that_fails_half_way_leaves_every_bit(
    model: nn.Module, served: Any, adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of its writes in turn; eviction, moving rows and replacing included."""
    pool = lk.AdapterPool(model, capacity=3, max_rank_total=12)
    made = fill(pool, adapter, 2, 5, 3)
    pool.evict("a")
    new = adapter(7, 6)
    names, before, undo = pool.names, served.bits(model), pool_write.undone_on_failure
    writes = 0

    class Failed(BaseException):
        pass

    def failing_at(limit: int) -> Any:
        @pool_write.contextmanager
        def guarded() -> Any:
            with undo() as put:

                def counted(place: Any, value: Any) -> None:
                    nonlocal writes
                    writes += 1
                    if writes > limit:
                        put(place, torch.full_like(place, 77))  # written, if not what was wanted
                        raise Failed
                    put(place, value)

                yield put if limit < 0 else counted

        return guarded

    for limit in range(200):
        writes = 0
        monkeypatch.setattr(pool_write, "undone_on_failure", failing_at(limit))
        try:
            pool.load("c" if limit % 2 else "d", new.tensors, new.config)
        except Failed:
            pass
        else:
            break
        assert served.bits(model) == before
        assert set(pool.names) == set(names)
        with torch.no_grad(), pool.batch(["b", "c", None, "b"]):
            served.check(model(X), X, [made[name] for name in ("b", "c", None, "b")])
    assert limit > 20


def test_refused_adapters_change_nothing(model: nn.Module, pool: lk.AdapterPool, served: Any, adapter: Any) -> None:
    fill(pool, adapter, 2, 5, 3)
    pool.pin("a")
    pool.pin("b")
    pool.pin("c")
    before, one = served.bits(model), adapter(5, 3)
    key = "base_model.model.blocks.1.v.lora_B.weight"
    refused: list[tuple[Any, Any, type[Exception], str]] = [
        (
            {**one.tensors, key: torch.zeros(8, 4)},
            one.config,
            lk.AdapterFormatError,
            r"shape \(8, 4\), expected \(8, 3\)",
        ),
        ({**one.tensors, key: torch.full((8, 3), torch.nan)}, one.config, lk.AdapterFormatError, "NaN or infinity"),
        (adapter(1, 13).tensors, adapter(1, 13).config, lk.UnservableAdapterError, "takes up to max_rank=12"),
        (one.tensors, None, lk.AdapterFormatError, "need the configuration"),
        ("nowhere", None, lk.AdapterFormatError, "nowhere"),
        (one.tensors, one.config, lk.PoolFullError, r"3 of 3 slots are taken.*pinned are \['a', 'b', 'c'\]"),
    ]
    for tensors, config, error, message in refused:
        with pytest.raises(error, match=message):
            pool.load("new", tensors, config)
        assert served.bits(model) == before
        assert pool.names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: p.load("", {}, None), lk.AdapterPoolError, "at least one character"),
        (lambda p: p.load(3, {}, None), lk.AdapterPoolError, "not 3"),
        (lambda p: p.evict("x"), lk.UnknownAdapterError, r"no adapter 'x' in the pool; loaded are \['a', 'b'\]"),
        (lambda p: p.pin("x"), lk.UnknownAdapterError, "no adapter 'x'"),
        (lambda p: p.unpin(None), lk.UnknownAdapterError, "no adapter None"),
        (lambda p: p.info("x"), lk.UnknownAdapterError, "no adapter 'x'"),
        (lambda p: p.evict("b"), lk.AdapterPoolError, "'b' is pinned; unpin it first"),
        (lambda p: p.ids(["a", "x"]), lk.UnknownAdapterError, "no adapter 'x'"),
        (lambda p: p.ids(["a", 0]), lk.UnknownAdapterError, "no adapter 0"),
        (lambda p: p.ids(["a", ["b"]]), lk.UnknownAdapterError, r"no adapter \['b'\]"),
        (lambda p: p.ids("a"), lk.AdapterPoolError, "expected a list of names"),
        (lambda p: p.ids({"a"}), lk.AdapterPoolError, "expected a list of names"),
        (
            lambda p: p.ids(["a"], out=torch.zeros(1)),
            lk.ShapeError,
            r"float32 \(1,\); expected torch.int32 \(m,\), m >= 1",
        ),
        (lambda p: p.ids(["a"] * 2, out=torch.zeros(1, dtype=torch.int32)), lk.ShapeError, "m >= 2"),
        (lambda p: p.batch(["a", "x"]).__enter__(), lk.UnknownAdapterError, "no adapter 'x'"),
        (lambda p: p.batch("a").__enter__(), lk.AdapterPoolError, "expected a list of names"),
        (lambda p: p.batch(torch.zeros(2)).__enter__(), lk.ShapeError, "ids are torch.float32; expected"),
        (lambda p: p.batch(torch.zeros(2, dtype=torch.int64)).__enter__(), lk.ShapeError, "ids are torch.int64"),
        (lambda p: p.batch(torch.zeros(4, dtype=torch.int32)[::2]).__enter__(), lk.ShapeError, "not contiguous"),
    ],
)
def test_bad_inputs(pool: lk.AdapterPool, adapter: Any, call: Any, error: type[Exception], message: str) -> None:
    fill(pool, adapter, 2, 5)
    pool.pin("b")
    before = repr(pool)
    with pytest.raises(error, match=message):
        call(pool)
    assert repr(pool) == before
    assert issubclass(error, lk.LoRAKernelsError)


def test_rows_that_do_not_fit_and_ids_that_name_no_slot(model: nn.Module, pool: lk.AdapterPool, adapter: Any) -> None:
    fill(pool, adapter, 2)
    with (
        pool.batch(["a", None, "a"]),
        pytest.raises(lk.ShapeError, match=r"blocks.0.q is called with x \(4, 3, 8\).*3 adapter ids"),
    ):
        model(X)
    ids = torch.tensor([0, 1, 3, 0], dtype=torch.int32)
    with pool.batch(ids), pytest.raises(lk.ShapeError, match="from 0 to 3; accepted are -1"):
        model(X)
    ids[2] = -2
    with pool.batch(ids), pytest.raises(lk.ShapeError, match="from -2 to 1"):
        model(X)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"capacity": 0}, lk.ConfigError, "capacity = 0: accepted is an integer of at least 1"),
        ({"capacity": True}, lk.ConfigError, "capacity = True"),
        ({"max_rank_total": 2.5}, lk.ConfigError, "max_rank_total = 2.5"),
        ({"max_rank_total": "12"}, lk.ConfigError, "max_rank_total = '12'"),
        ({"max_rank": 13}, lk.ConfigError, "max_rank = 13: accepted are ranks up to max_rank_total = 12"),
        ({"target_modules": ["nothing"]}, lk.ConfigError, "no linear layer to pool"),
        ({"backend": "fast"}, lk.ConfigError, "fast"),
        ({"backend": "cuda"}, lk.BackendUnavailableError, "cuda"),
    ],
)
def test_a_pool_that_cannot_be_made_leaves_the_model_alone(
    model: nn.Module, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        lk.AdapterPool(model, **{"capacity": 3, "max_rank_total": 12, **options})
    assert {type(layer) for layer in model.modules()}.isdisjoint({_Pooled})
    assert not list(model.named_buffers())


def test_numbers_too_large_for_the_layers_dtype_are_refused(
    model: nn.Module, pool: lk.AdapterPool, adapter: Any
) -> None:
    one = adapter(0, 2)
    key = "base_model.model.blocks.1.q.lora_A.weight"
    model.bfloat16()
    with pytest.raises(lk.AdapterFormatError, match=r"blocks.1.q.lora_A holds numbers too large for torch.bfloat16"):
        pool.load("a", {**one.tensors, key: torch.full_like(one.tensors[key], 3.4e38)}, one.config)
    assert not len(pool)
