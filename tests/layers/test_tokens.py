"""Modules of whose weight some rows are trained."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lora_kernels.layers.tokens import TrainedRows, base_class, into_trained_rows, out_of_trained_rows


class Scaled(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 3


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled, nn.Linear])
def test_the_forward_is_the_modules_own_over_the_exchanged_rows(kind: type[nn.Module]) -> None:
    module = nn.Linear(4, 10, bias=False) if kind is nn.Linear else kind(10, 4)
    expected, W = copy.deepcopy(module), module.weight
    x = torch.randn(3, 4) if kind is nn.Linear else torch.tensor([[1, 7, 0, 7]])
    y = module(x)
    delta = into_trained_rows(module, [7, 2])
    assert torch.equal(module(x), y)
    with torch.no_grad():
        delta.add_(1)
        expected.weight[[7, 2]] = delta
    assert torch.equal(module(x), expected(x))
    assert isinstance(module, kind)
    assert module._parameters["weight"] is W
    assert sorted(module.state_dict()) == ["trainable_tokens_delta", "weight"]
    module(x).sum().backward()
    assert delta.grad is not None
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.deepcopy(module).double().float()):
        assert torch.equal(other(x), expected(x))
        assert other.trainable_tokens_delta is not delta
    module.merge()
    assert module.merged
    assert torch.equal(module.weight, expected.weight)
    module.unmerge()
    assert module._parameters["weight"] is W
    module.merge()
    out_of_trained_rows(module)
    assert type(module) is kind
    assert torch.equal(module.weight, expected.weight)
    assert list(module.state_dict()) == ["weight"]


def test_rows_are_float32_beside_16_bit_and_move_with_the_module() -> None:
    module = nn.Embedding(10, 4).bfloat16()
    assert into_trained_rows(module, [3]).dtype == torch.float32
    assert module(torch.tensor([3])).dtype == torch.bfloat16
    assert module.to("meta").weight.device.type == "meta"


def test_two_modules_share_rows_and_what_they_merge_into() -> None:
    embedding, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    into_trained_rows(head, [3], into_trained_rows(embedding, [3]))
    pair = copy.deepcopy(nn.ModuleList([embedding, head]))
    assert pair[0].trainable_tokens_delta is pair[1].trainable_tokens_delta
    assert pair[1].merge(pair[0].merge()) is pair[0]._parameters["weight"]
    assert base_class(pair[1]) is nn.Linear
    assert isinstance(pair[0], TrainedRows)


def test_no_rows_are_fine() -> None:
    module = nn.Embedding(10, 4)
    y = module(torch.arange(10))
    into_trained_rows(module, [])
    assert torch.equal(module(torch.arange(10)), y)
