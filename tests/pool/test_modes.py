"""The model under an AdapterPool: closed, copied, converted, saved, compiled, in every mode of autograd."""

from __future__ import annotations

import asyncio
import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.pool.files import read_updates
from tests.pool.pools import X, fill


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
    one, read = adapter(0, 2), read_updates

    def closing(*given: Any) -> Any:
        with pytest.raises(lk.AdapterBusyError, match="1 batches or loads are running"):
            pool.close()
        return read(*given)

    monkeypatch.setattr("lora_kernels.pool.pool.read_updates", closing)
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
    pool.probe(X)
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
        with pool.batch([("a", 0.5), None, "b", ("a", 2.0)]):
            torch.testing.assert_close(compiled(X), model(X))
        with pool.batch(["b"]):  # whatever the rows
            served.check(compiled(X), X, [made["b"]] * 4)


def test_what_torch_compile_cannot_see_is_refused(model: nn.Module, pool: lk.AdapterPool, adapter: Any) -> None:
    fill(pool, adapter, 2, 5)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with (
        torch.no_grad(),
        pool.batch(["a", None, "b", "a"]),
        pytest.raises(Exception, match=r"it is not known which row belongs.*pool\.probe"),
    ):
        compiled(X)
    pool.probe(X)

    async def task(name: str) -> str:
        try:
            with pool.batch([name, None] * 2):
                await asyncio.sleep(0)
                compiled(X)
        except Exception as error:
            return str(error)
        return ""

    async def both() -> list[str]:
        return await asyncio.gather(task("a"), task("b"))

    with torch.no_grad():  # around both: the tasks end in another order than they began
        messages = asyncio.run(both())
    for message in messages:
        assert "several tasks of this thread have a batch open" in message
