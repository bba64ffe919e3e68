"""A pool in use: loads, evictions and pins between calls and in threads, every token judged against its adapter alone.

The test keeps the adapters it gave and never reads the pool's books but for where rows are free: those hold NaN.
"""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.testing import Pool

NAMES = [f"n{i}" for i in range(8)]
SHAPES: list[tuple[tuple[str, ...], tuple[int, ...]]] = [
    (("q", "v"), (0, 1)), (("q",), (0, 1)), (("v",), (1,)), (("q", "v"), (0,)),
]  # fmt: skip


def poison(pool: lk.AdapterPool) -> None:
    """Rows that belong to no slot hold NaN."""
    for path, layout in pool._state.layouts.items():
        layer = pool._pooled.layers[path]
        for start, rank in layout.gaps():
            layer.pool_A[start : start + rank] = torch.nan
            layer.pool_Bt[start : start + rank] = torch.nan


def churn(rng: random.Random, pool: lk.AdapterPool, held: dict[str, Any], adapter: Any) -> str:
    """One thing that happens to the pool between two calls; what it did."""
    name, action = rng.choice(NAMES), rng.choice(["load"] * 5 + ["evict", "evict", "unpin", "unpin", "pin"])
    if action != "load":
        try:
            getattr(pool, action)(name)
        except lk.UnknownAdapterError:
            assert name not in held
            return "unknown"
        except lk.AdapterPoolError:
            assert action == "evict"
            assert pool.info(name).pinned
            return "pinned"
        if action == "evict":
            del held[name]
        return action
    one = adapter(rng.randrange(1000), rng.randint(1, 9), *rng.choice(SHAPES))
    before = set(pool.names)
    try:
        pool.load(name, one.tensors, one.config, pin=rng.random() < 0.1)
    except lk.PoolFullError:
        assert set(pool.names) == before
        assert any(pool.info(other).pinned for other in before)
        return "full"
    held[name] = one
    for other in before - set(pool.names):
        del held[other]
    assert set(pool.names) == set(held)
    return "replaced" if name in before else "loaded"


def judge(served: Any, x: Tensor, y: Tensor, adapters: list[Any], together: Pool) -> None:
    """x, y (tokens, 8) and the adapter of each."""
    plain, truth = torch.empty_like(y), torch.empty_like(y, dtype=torch.float64)
    for one in {id(one): one for one in adapters}.values():
        rows = [row for row, other in enumerate(adapters) if other is one]
        plain[rows] = served.alone(x[rows], one, x.dtype)
        for row in rows:
            truth[row] = served.alone(x[row], one, torch.float64, x.dtype)
    together.assert_close(y, plain, truth, what="tokens")


def mix(rng: random.Random, names: list[str]) -> list[str | None]:
    few = rng.sample(names, min(len(names), rng.randint(1, 3)))
    return [rng.choice([*few, None]) for _ in range(rng.choice((1, 2, 3, 5)))]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("seed", range(4))
def test_every_token_as_its_adapter_alone(served: Any, adapter: Any, seed: int) -> None:
    rng, did, together = random.Random(seed), set(), Pool()
    torch.manual_seed(seed)
    model = served().eval()
    sizes = {"capacity": rng.choice((3, 4, 5)), "max_rank_total": rng.choice((12, 24)), "max_rank": 9}
    pool, held = lk.AdapterPool(model, batch_dim=0, **sizes), dict[str, Any]()  # tokens alone would say as little of it
    places = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    static = torch.full((10,), -1, dtype=torch.int32)
    for _ in range(60):
        did |= {churn(rng, pool, held, adapter) for _ in range(rng.randint(0, 3))}
        poison(pool)
        names = mix(rng, list(held)) if held else [None]
        length, beams = rng.choice((1, 2, 4)), rng.choice((1, 1, 2))
        names = [name for name in names for _ in range(beams)]
        x = torch.randn(len(names), length, 8)
        each = [held.get(name) for name in names for _ in range(length)]  # type: ignore[arg-type]
        with torch.no_grad():
            if rng.random() < 0.7:
                with pool.batch(names):
                    y = model(x)
            elif rng.random() < 0.5:
                with pool.batch(pool.ids(names)):
                    y = model(x)
            else:  # a row for each token, padded to the static size
                x = torch.randn(1, 10, 8)
                each = [held.get(name) for name in names]  # type: ignore[arg-type]
                each += [None] * (10 - len(each))
                with pool.batch(static):
                    pool.ids(names, out=static)
                    y = model(x)
        judge(served, x.reshape(-1, 8), y.reshape(-1, 8), each, together)
    together.close()
    assert {name: buffer.data_ptr() for name, buffer in model.named_buffers()} == places
    assert did >= {"loaded", "replaced", "evict", "unknown"}


def test_threads_load_while_others_run_batches(served: Any, adapter: Any) -> None:
    """Two threads serve a pinned adapter each, a third whatever is loaded; two load, replace and evict all the time."""
    model: nn.Module = served().eval()
    pool = lk.AdapterPool(model, capacity=5, max_rank_total=22, max_rank=9)
    fixed = {name: adapter(seed, rank) for seed, (name, rank) in enumerate((("first", 3), ("second", 5)))}
    for name, one in fixed.items():
        pool.load(name, one.tensors, one.config, pin=True)
    changing = {f"{name}{i}": adapter(10 * i, r) for name, i, r in (("x", 1, 2), ("x", 2, 9), ("x", 3, 4), ("x", 4, 6))}
    errors: list[BaseException] = []
    together = Pool()
    stop, busy = threading.Event(), threading.Event()

    def guarded(work: Any, seed: int) -> threading.Thread:
        def run() -> None:
            rng = random.Random(seed)
            try:
                work(rng)
            except BaseException as error:
                errors.append(error)
                stop.set()

        return threading.Thread(target=run, daemon=True)

    def check(names: list[str | None], rng: random.Random) -> None:
        x = torch.randn(len(names), 2, 8, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
        with torch.no_grad(), pool.batch(names):
            y = model(x)
            again = model(x)
        served.check(y, x, [(fixed | changing).get(name) for name in names], together)  # type: ignore[arg-type]
        served.check(again, x, [(fixed | changing).get(name) for name in names], together)  # type: ignore[arg-type]

    def serve(name: str) -> Any:
        def work(rng: random.Random) -> None:
            for _ in range(40):
                check([name, None, name], rng)

        return work

    def serve_any(rng: random.Random) -> None:
        for _ in range(40):
            names = [*rng.sample(pool.names, 2), None]
            try:
                check(names, rng)
            except lk.UnknownAdapterError:  # evicted since it was named
                continue

    def load(rng: random.Random) -> None:
        while not stop.is_set():
            name = rng.choice(list(changing))
            try:
                if rng.random() < 0.3:
                    pool.evict(name)
                else:
                    pool.load(name, changing[name].tensors, changing[name].config)
            except (lk.UnknownAdapterError, lk.PoolFullError):
                continue
            except lk.AdapterBusyError:
                busy.set()

    serving = [guarded(serve(name), i) for i, name in enumerate(fixed)] + [guarded(serve_any, 2)]
    loading = [guarded(load, 3), guarded(load, 4)]
    for thread in serving + loading:
        thread.start()
    for thread in serving:
        thread.join(timeout=900)
    stop.set()
    for thread in loading:
        thread.join(timeout=900)
    assert not errors, errors[0]
    together.close()
    assert not any(thread.is_alive() for thread in serving + loading)
    assert not any(pool.info(name).batches for name in pool.names)
    pool.close()
