"""What the isolation probe sees of rows that belong together, mix, or are chosen by content."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_kernels.pool.active import ActiveBatch
from lora_kernels.pool.isolation import Isolation, isolate
from lora_kernels.pool.layer import PoolSettings, into_pooled
from lora_kernels.pool.rows import BLOCK, TILED

K = 4
BOTH = {BLOCK, TILED}


class Model(nn.Module):
    def __init__(self, arrange: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.arrange, self.layer, self.active = arrange, nn.Linear(K, K), ActiveBatch()
        into_pooled(self.layer, PoolSettings(1, 1, 1), self.active, "layer")

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.arrange(x))


def probe(arrange: Any, x: Tensor, subsets: tuple[int, ...] = (-1, 1, 1), **options: Any) -> Isolation:
    """subsets: the shape that numbers the requests along x's dimensions."""

    def alter(leaf: Tensor, subset: Tensor, generator: torch.Generator) -> Tensor:
        return torch.where(subset.view(subsets), torch.randn(leaf.shape, generator=generator), leaf)

    model = Model(arrange)
    count = x.shape[:2].numel() if options.get("flat") else len(x)
    return isolate(model, model.active, (x,), {}, count, alter, **options)


def axes(found: Isolation) -> dict[int, set[str]]:
    (places,) = found.places.values()
    result = dict[int, set[str]]()
    for axis, order in places or ():
        result.setdefault(axis, set()).add(order)
    return result


@pytest.mark.parametrize("count", [2, 3, 7, 8])
def test_rows_that_are_apart(count: int) -> None:
    x = torch.randn(count, 3, K)
    assert axes(probe(lambda x: x, x)) == {0: BOTH}
    assert axes(probe(lambda x: x.transpose(0, 1), x)) == {1: BOTH}
    assert axes(probe(lambda x: x.flatten(0, 1), x)) == {0: {BLOCK}}
    assert axes(probe(lambda x: x.transpose(0, 1).flatten(0, 1), x)) == {0: {TILED}}
    assert axes(probe(lambda x: x + x.mean(1, keepdim=True), x)) == {0: BOTH}
    found = probe(lambda x: x, x)
    assert found.complete()
    assert found.known() == len(found.apart) == 1


@pytest.mark.parametrize("count", [2, 3, 7])
def test_rows_that_mix(count: int) -> None:
    found = probe(lambda x: x + 0.05 * x.mean(0), torch.randn(count, 3, K))
    assert axes(found) == {}
    assert not found.apart
    assert not found.complete()


def test_rows_in_another_order_are_apart_without_a_place() -> None:
    found = probe(lambda x: x.flip(0), torch.randn(3, 3, K))
    assert axes(found) == {}
    assert found.apart == {("layer", 3)}


def test_rows_that_are_chosen_by_content() -> None:
    found = probe(lambda x: x[x[..., 0] > 0], torch.randn(3, 4, K))
    assert found.places == {("layer", 2): {}}
    assert not found.apart


def test_last_bits_are_no_dependence() -> None:
    found = probe(lambda x: x * (1 + 1e-6 * x.mean()), torch.randn(3, 3, K))
    assert axes(found) == {0: BOTH}
    assert not found.apart  # which decides on the dimension of the requests, and takes every bit


def test_rows_of_no_request() -> None:
    assert probe(lambda x: torch.ones(3, K), torch.randn(3, 3, K)).places == {}
    assert axes(probe(lambda x: torch.cat([torch.ones(3, 1, K), x], 1), torch.randn(3, 3, K))) == {0: BOTH}


def test_random_states_are_the_same_in_every_run() -> None:
    torch.manual_seed(5)
    found = probe(lambda x: x + torch.randn(3, 3, K), torch.randn(3, 3, K))
    assert axes(found) == {0: BOTH}


def test_tokens_are_counted_over_all_dimensions() -> None:
    x = torch.randn(2, 3, K)
    assert axes(probe(lambda x: x, x, (2, 3, 1), flat=True)) == {0: BOTH}
    assert axes(probe(lambda x: x.transpose(0, 1), x, (2, 3, 1), flat=True)) == {}
    assert axes(probe(lambda x: x + x.mean(1)[:, None], x, (2, 3, 1), flat=True)) == {}
