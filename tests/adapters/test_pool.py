"""AdapterPool as a server uses it: loads, evictions, pins and batches, each row judged against its adapter alone."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.adapters import pool_write

X = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model(served: Any) -> nn.Module:
    return served().eval()


@pytest.fixture
def pool(model: nn.Module) -> lk.AdapterPool:
    return lk.AdapterPool(model, capacity=3, max_rank_total=12)


def fill(pool: lk.AdapterPool, adapter: Any, *ranks: int) -> dict[str | None, Any]:
    """Adapters "a", "b", ... of these ranks, and None."""
    made = {chr(ord("a") + i): adapter(i, r) for i, r in enumerate(ranks)}
    for name, one in made.items():
        pool.load(name, one.tensors, one.config)
    return {None: None, **made}


def test_each_sequence_gets_its_adapter(model: nn.Module, pool: lk.AdapterPool, served: Any, adapter: Any) -> None:
    made = fill(pool, adapter, 2, 5, 3)
    names = ["b", None, "a", "c"]
    with torch.no_grad(), pool.batch(names):
        served.check(model(X), X, [made[name] for name in names])
        served.check(
            model(X.repeat_interleave(2, 0)), X.repeat_interleave(2, 0), [made[n] for n in names for _ in "12"]
        )
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
        (lambda p: p.batch(torch.zeros(4, dtype=torch.int32)[::2]).__enter__(), lk.ShapeError, "with gaps"),
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
        pytest.raises(lk.ShapeError, match=r"blocks.0.q sees x \(4, 3, 8\).*3 adapter ids"),
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
        ({"max_rank": 13}, lk.ConfigError, "max_rank = 13: no more than max_rank_total = 12"),
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
    assert {type(layer) for layer in model.modules()}.isdisjoint({lk.adapters.pool_model._Pooled})
    assert not list(model.named_buffers())


def test_close_gives_the_model_back(model: nn.Module, adapter: Any) -> None:
    before = (
        [(path, type(m), sorted(vars(m))) for path, m in model.named_modules()],
        [p.requires_grad for p in model.parameters()],
    )
    keys = list(model.state_dict())
    with lk.AdapterPool(model, capacity=2, max_rank_total=8) as pool:
        assert list(model.state_dict()) == keys
        assert not any(p.requires_grad for p in model.parameters())
        one = adapter(0, 2)
        pool.load("a", one.tensors, one.config)
    after = (
        [(path, type(m), sorted(vars(m))) for path, m in model.named_modules()],
        [p.requires_grad for p in model.parameters()],
    )
    assert after == before
    assert repr(pool) == "AdapterPool(Served, closed)"
    pool.close()
    assert pool.names == ()
    for call in (lambda: pool.load("a", one.tensors, one.config), lambda: pool.ids([None]), lambda: pool.evict("a")):
        with pytest.raises(lk.AdapterPoolError, match="this pool is closed"):
            call()
    lk.AdapterPool(model, capacity=2, max_rank_total=8).close()


def test_a_pool_stays_open_while_it_loads(pool: lk.AdapterPool, adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one, read = adapter(0, 2), lk.adapters.pool.read_updates

    def closing(*given: Any) -> Any:
        with pytest.raises(lk.AdapterBusyError, match="1 batches or loads are running"):
            pool.close()
        return read(*given)

    monkeypatch.setattr("lora_kernels.adapters.pool.read_updates", closing)
    pool.load("a", one.tensors, one.config)
    with pytest.raises(lk.AdapterFormatError):
        pool.load("b", {}, one.config)
    pool.close()


def test_copies_and_pickles_are_the_frozen_model(
    model: nn.Module, pool: lk.AdapterPool, served: Any, adapter: Any
) -> None:
    fill(pool, adapter, 2)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert {type(m) for m in other.modules()} == {type(m) for m in served().modules()}
        with torch.no_grad(), pool.batch(["a"]):
            assert torch.equal(other(X), served.alone(X, None, X.dtype))
    lk.AdapterPool(other, capacity=1, max_rank_total=4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_model_may_be_converted(
    model: nn.Module, pool: lk.AdapterPool, served: Any, adapter: Any, dtype: torch.dtype
) -> None:
    made = fill(pool, adapter, 2, 5)
    model.to(dtype)
    made["c"] = adapter(4, 3)
    pool.load("c", made["c"].tensors, made["c"].config)
    names, x = ["c", "b", None, "a"], torch.randn(4, 100, 8).to(dtype)
    with torch.no_grad(), pool.batch(names):
        served.check(model(x), x, [made[name] for name in names])
    assert {m.pool_scalings.dtype for m in model.modules() if hasattr(m, "pool_scalings")} == {torch.float32}


def test_numbers_too_large_for_the_layers_dtype_are_refused(
    model: nn.Module, pool: lk.AdapterPool, adapter: Any
) -> None:
    one = adapter(0, 2)
    key = "base_model.model.blocks.1.q.lora_A.weight"
    model.half()
    with pytest.raises(lk.AdapterFormatError, match=r"blocks.1.q.lora_A holds numbers too large for torch.float16"):
        pool.load("a", {**one.tensors, key: one.tensors[key] * 1e7}, one.config)
    assert not len(pool)


def test_state_dict_goes_in_and_out_under_a_pool(
    model: nn.Module, pool: lk.AdapterPool, served: Any, adapter: Any
) -> None:
    fill(pool, adapter, 2)
    torch.manual_seed(9)
    model.load_state_dict({name: torch.randn_like(t) for name, t in served().state_dict().items()})
    other = served()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(X), model(X))


@pytest.mark.parametrize("how", ["inference_mode", "no_grad", "grad", "autocast"])
def test_in_every_mode(model: nn.Module, pool: lk.AdapterPool, served: Any, adapter: Any, how: str) -> None:
    modes = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}
    names = ["a", None, "b", "a"]
    with modes.get(how, torch.no_grad)():
        made = fill(pool, adapter, 2, 5)
        assert not pool.ids(names).is_inference()  # which would be looked at in every layer, and save no backward
        x = X.clone().requires_grad_(how == "grad")
        if how == "autocast":
            with torch.autocast("cpu", torch.bfloat16), pool.batch(names):
                y = model(x)
            assert (
                y - torch.stack([served.alone(X[i], made[n], X.dtype) for i, n in enumerate(names)])
            ).abs().max() < 0.5
            return
        with pool.batch(names):
            y = model(x)
        served.check(y.detach(), X, [made[name] for name in names])
    if how == "grad":
        y.square().sum().backward()
        other = X[2].clone().requires_grad_()
        with pool.batch(["b"]):
            model(other[None]).square().sum().backward()
        assert torch.allclose(x.grad[2], other.grad, rtol=1e-4, atol=1e-5)  # type: ignore[index]


def test_under_torch_compile(model: nn.Module, pool: lk.AdapterPool, served: Any, adapter: Any) -> None:
    """One graph serves every mix, what is loaded later, and a batch of ids; the base alone is a graph of its own."""
    made = fill(pool, adapter, 2, 5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    with torch.no_grad():
        graphs = []
        for names in (["a", None, "b", "a"], ["b", "b", "a", None], [None, None, None, "c"], ["c", "a", "c", "b"]):
            if "c" in names and "c" not in pool:
                made["c"] = adapter(8, 4)
                pool.load("c", made["c"].tensors, made["c"].config)
            with pool.batch(names):
                served.check(compiled(X), X, [made[name] for name in names])
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert len(set(graphs)) == 1
        with pool.batch(pool.ids(["c", "a", None, "b"])):
            served.check(compiled(X), X, [made[name] for name in ("c", "a", None, "b")])
        assert torch.equal(compiled(X), served.alone(X, None, X.dtype))


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
