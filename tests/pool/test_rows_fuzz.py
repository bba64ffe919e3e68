"""Random models that lay their rows out in every way: each request as alone, or refused; never another's adapter."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_kernels as lk

K = 8


class Layout(nn.Module):
    """A linear layer with its rows in the layout ``kind``; h (n, T, K) to (n, T, K)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.core, self.other, self.gate = nn.Linear(K, K), nn.Linear(K, K), nn.Linear(K, 2)
        self.table = nn.Parameter(torch.randn(2, K))

    def forward(self, h: Tensor) -> Tensor:
        (n, T, _), core = h.shape, self.core
        if self.kind == "plain":
            return core(h)
        if self.kind == "time first":
            return core(h.transpose(0, 1)).transpose(0, 1)
        if self.kind == "flat":
            return core(h.reshape(n * T, K)).view(n, T, K)
        if self.kind == "time first, flat":
            return core(h.transpose(0, 1).reshape(T * n, K)).view(T, n, K).transpose(0, 1)
        if self.kind == "packed":
            return core(h.reshape(1, n * T, K)).view(n, T, K)
        if self.kind == "windows":
            w = 2 if T % 2 == 0 else 1
            return core(h.reshape(n * T // w, w, K)).view(n, T, K)
        if self.kind == "windows first":
            w = 2 if T % 2 == 0 else 1
            return (
                core(h.view(n, T // w, w, K).transpose(0, 1).reshape(-1, w, K))
                .view(T // w, n, w, K)
                .transpose(0, 1)
                .reshape(n, T, K)
            )
        if self.kind == "twice":
            one, two = core(torch.cat([h, -h])).chunk(2)
            return one - two
        if self.kind == "each twice":
            return core(h.repeat_interleave(2, 0))[::2]
        if self.kind == "class token":
            return core(torch.cat([self.table[:1].expand(n, 1, K), h], 1))[:, 1:] + h
        if self.kind == "first token":
            return h + core(h[:, 0])[:, None]
        if self.kind == "first token kept":
            return h + core(h[:, :1])
        if self.kind == "mean":
            return h + core(h.mean(1))[:, None]
        if self.kind == "table":
            return h + core(self.table)[0]
        if self.kind == "reversed":
            return core(h.flip(0)).flip(0)
        if self.kind == "routed":
            rows, y = h.reshape(n * T, K), torch.zeros(n * T, K)
            chosen = self.gate(rows).argmax(-1)
            for number, expert in enumerate((self.core, self.other)):
                at = (chosen == number).nonzero()[:, 0]
                y[at] = expert(rows[at])
            return y.view(n, T, K)
        if self.kind == "routed with a bias":
            rows, y = h.reshape(n * T, K), torch.zeros(n * T, K)
            chosen = (self.gate(rows) + torch.tensor([2.0, 0.0])).argmax(-1)
            for number, expert in enumerate((self.core, self.other)):
                at = (chosen == number).nonzero()[:, 0]
                y[at] = expert(rows[None, at])[0]
            return y.view(n, T, K)
        if self.kind == "best tokens":
            rows, y = h.reshape(n * T, K), torch.zeros(n * T, K)
            at = self.gate(rows)[:, 0].topk((n * T + 1) // 2).indices
            y[at] = core(rows[at])
            return y.view(n, T, K) + h
        raise AssertionError(self.kind)


KINDS = [
    "plain", "time first", "flat", "time first, flat", "packed", "windows", "windows first", "twice", "each twice",
    "class token", "first token", "first token kept", "mean", "table", "reversed", "routed", "routed with a bias",
    "best tokens",
]  # fmt: skip
TOGETHER = {"best tokens"}  # a request's result depends on the others; such a layer is refused


class Toy(nn.Module):
    def __init__(self, kinds: list[str], mixes: bool, time_first: bool, tokens: bool) -> None:
        super().__init__()
        self.mixes, self.time_first = mixes, time_first
        self.embedding = nn.Embedding(11, K) if tokens else None
        self.layers = nn.ModuleList([Layout(kind) for kind in kinds])

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.embedding is None else self.embedding(x)
        if self.time_first:
            h = h.transpose(0, 1)
        for layer in self.layers:
            if self.mixes:
                h = h + torch.softmax(h @ h.transpose(1, 2), -1) @ h
            h = torch.tanh(layer(h))
        return h.transpose(0, 1) if self.time_first else h


def adapters(model: nn.Module, paths: list[str], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for path in paths:
        layer: Any = model.get_submodule(path)
        made[f"base_model.model.{path}.lora_A.weight"] = torch.randn(2, K, generator=generator)
        made[f"base_model.model.{path}.lora_B.weight"] = torch.randn(len(layer.weight), 2, generator=generator)
    return made


def alone(make: Any, x: Tensor, tensors: dict[str, Tensor] | None) -> Tensor:
    model = make()
    with torch.no_grad():
        for key, A in (tensors or {}).items():
            if ".lora_A." in key:
                path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                weight: Any = model.get_submodule(path).weight
                weight += (tensors or {})[key.replace("lora_A", "lora_B")] @ A
        return model(x)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("seed", range(48))
def test_each_request_as_alone_or_refused(seed: int) -> None:
    rng = random.Random(seed)
    kinds = [KINDS[seed % len(KINDS)], *rng.sample(KINDS, rng.randint(0, 2))]
    mixes, time_first, tokens = rng.random() < 0.6, rng.random() < 0.3, rng.random() < 0.4

    def make() -> Toy:
        torch.manual_seed(seed)
        return Toy(kinds, mixes, time_first, tokens).eval()

    model = make()
    pool = lk.AdapterPool(model, capacity=3, max_rank_total=6)
    paths = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear) and "gate" not in path]
    tensors: dict[str | None, Any] = {None: None}
    for name in "abc":
        tensors[name] = adapters(model, rng.sample(paths, rng.randint(1, len(paths))), seed + ord(name))
        targets = sorted({key.split(".", 2)[2].rsplit(".", 2)[0] for key in tensors[name]})
        pool.load(name, tensors[name], lk.LoRAConfig(r=2, lora_alpha=2, target_modules=targets))
    for _ in range(10):
        n, T = rng.randint(2, 4), rng.randint(1, 5)
        names = [rng.choice(["a", "b", "c", None]) for _ in range(n)]
        shape = (T, n) if time_first else (n, T)
        x = torch.randint(11, shape) if tokens else torch.randn(*shape, K)
        try:
            with torch.no_grad(), pool.batch(names):
                y = model(x)
        except lk.AdapterPoolError:
            continue
        if set(kinds) & TOGETHER:
            assert len(set(names)) == 1 or not any(
                f"layers.{at}.core" in key for at, kind in enumerate(kinds) if kind in TOGETHER
                for name in names if name for key in tensors[name]
            )  # fmt: skip
            continue
        dim = 1 if time_first else 0
        for at, name in enumerate(names):
            wanted = alone(make, x.narrow(dim, at, 1), tensors[name])
            torch.testing.assert_close(y.narrow(dim, at, 1), wanted, rtol=1e-3, atol=1e-3)


SERVED = [
    "plain", "time first", "flat", "time first, flat", "packed", "windows", "windows first", "twice", "each twice",
    "class token", "first token", "first token kept", "mean",
]  # fmt: skip


@pytest.mark.parametrize("kind", SERVED)
def test_layouts_that_are_served(kind: str) -> None:
    """Whatever the sizes, once the probe has seen what they depend on."""
    served = Counter[bool]()
    for tokens in (False, True):

        def make(tokens: bool = tokens) -> Toy:
            torch.manual_seed(0)
            return Toy([kind, "plain"], True, False, tokens).eval()

        model = make()
        pool = lk.AdapterPool(model, capacity=2, max_rank_total=4, target_modules=r".*core")
        for name in "ab":
            paths = ["layers.0.core", "layers.1.core"]
            pool.load(name, adapters(model, paths, ord(name)), lk.LoRAConfig(r=2, lora_alpha=2, target_modules=paths))
        for n, T in ((2, 4), (3, 3), (4, 2), (2, 2), (3, 6), (2, 1)):
            x = torch.randint(11, (n, T)) if tokens else torch.randn(n, T, K)
            with torch.no_grad(), pool.batch(["a", None, "b", "a"][:n]):
                y = model(x)
            served[True] += len(y) == n
    assert served[True] == 12
