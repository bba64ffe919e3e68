"""Calls whose rows are elsewhere than in the call that was probed, because a list of lengths says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_kernels as lk

NAMES: tuple[str | None, ...] = ("a", "b", None, "a")


class Packed(nn.Module):
    """Rows of the sequences one after another, as many of each as a list says."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        y = self.layer(torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)])[None])[0]
        return nn.utils.rnn.pad_sequence(y.split(list(lengths)), batch_first=True)


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def pooled(model: nn.Module) -> tuple[lk.AdapterPool, dict[str | None, Tensor]]:
    """A pool with two adapters, and what each adds to the weight."""
    pool, added = lk.AdapterPool(model, capacity=2, max_rank_total=8), dict[str | None, Tensor]()
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        A, B = torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator)
        tensors = {"base_model.model.layer.lora_A.weight": A, "base_model.model.layer.lora_B.weight": B}
        pool.load(name, tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["layer"]})
        added[name] = B @ A
    added[None] = torch.zeros(8, 8)
    return pool, added


def outcome(model: nn.Module, pool: lk.AdapterPool, added: Any, call: Callable[[], Tensor]) -> str:
    expected = []
    for name in NAMES:
        with torch.no_grad():
            model.layer.weight += added[name]
            expected.append(call())
            model.layer.weight -= added[name]
    try:
        with torch.no_grad(), pool.batch(list(NAMES)):
            found = call()
    except lk.UnknownRowsError:
        return "refused"
    rows = [torch.allclose(found[i], expected[i][i], rtol=1e-4, atol=1e-4) for i in range(len(NAMES))]
    return "right" if all(rows) else f"wrong: {rows}"


X = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(9))


def test_other_lengths_in_a_list_are_probed_anew() -> None:
    model = Packed().eval()
    pool, added = pooled(model)
    assert outcome(model, pool, added, lambda: model(X, [3, 3, 3, 3])) == "right"
    assert outcome(model, pool, added, lambda: model(X, [1, 5, 2, 4])) == "refused"


@pytest.mark.parametrize("tokens", [4, 5, 8])
def test_a_layer_of_rows_is_served_at_every_size(tokens: int) -> None:
    model = Rows().eval()
    pool, added = pooled(model)
    assert outcome(model, pool, added, lambda: model(X[:, :3])) == "right"
    assert outcome(model, pool, added, lambda: model(X[:, :tokens])) == "right"
