"""Runs of a model's layers in place of its layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_kernels.errors import ConfigError
from lora_kernels.layers.replication import replicate_layers


class Config:
    num_hidden_layers = 3


class Layer(nn.Linear):
    def __init__(self, layer_idx: int) -> None:
        super().__init__(4, 4)
        self.layer_idx = layer_idx


class Stack(nn.Module):
    """With the layers where Llama, BERT or Falcon have them."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.config, owner = Config(), self
        *inner, last = path.split(".")
        for name in inner:
            setattr(owner, name, nn.Module())
            owner = getattr(owner, name)
        setattr(owner, last, nn.ModuleList(Layer(i) for i in range(3)))
        self.path = path


@pytest.mark.parametrize("path", ["model.layers", "model.model.layers", "bert.encoder.layer", "encoder.layer", "h"])
def test_copies_share_parameters_and_have_indices_of_their_own(path: str) -> None:
    model = Stack(path)
    before = list(model.get_submodule(path))
    assert replicate_layers(model, [[0, 2], [1, 3]]) is model
    after = list(model.get_submodule(path))
    assert [layer.weight is before[i].weight for layer, i in zip(after, (0, 1, 1, 2), strict=True)] == [True] * 4
    assert len({id(layer) for layer in after}) == 4
    assert [layer.layer_idx for layer in after] == [0, 1, 2, 3]
    assert model.config.num_hidden_layers == 4
    assert replicate_layers(model, [(0, 2), (1, 3)]) is model
    assert list(model.get_submodule(path)) == after
    with pytest.raises(ConfigError, match=r"were already replicated by \[\[0, 2\], \[1, 3\]\]"):
        replicate_layers(model, [[0, 1]])


def test_what_cannot_be_done() -> None:
    with pytest.raises(ConfigError, match="Stack has 3 layers"):
        replicate_layers(Stack("h"), [[0, 4]])
    with pytest.raises(ConfigError, match="Linear has no list of layers"):
        replicate_layers(nn.Linear(2, 2), [[0, 1]])


def test_buffers_are_copies() -> None:
    model = Stack("h")
    model.h[0].register_buffer("seen", torch.zeros(1))
    replicate_layers(model, [[0, 1], [0, 1]])
    model.h[0].seen += 1
    assert float(model.h[1].seen) == 0
