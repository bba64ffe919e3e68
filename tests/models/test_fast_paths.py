"""PyTorch's inference path of nn.TransformerEncoderLayer, off around adapted layers and on again."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lora_kernels.models.fast_paths import KEPT, is_off, switch_off, switch_on


class Adapted(nn.Linear):
    """A layer that has an adapter."""


def encoder(activation="relu"):
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, activation=activation), 2)


def adapted(module):
    return isinstance(module, Adapted)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_off_where_a_layer_is_adapted_and_on_again(activation):
    model = nn.ModuleDict({"one": encoder(activation), "other": encoder(activation)}).eval()
    before = [dict(vars(module)) for module in model.modules()]
    own = model["one"].layers[1].linear2
    model["one"].layers[1].linear2 = Adapted(24, 16)
    switch_off(model, adapted)
    switch_off(model, adapted)
    assert [is_off(layer) for name in model for layer in model[name].layers] == [False, True, False, False]
    assert [model[name].use_nested_tensor for name in model] == [False, True]
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model["one"].layers[1].self_attn)))
    assert KEPT not in vars(copied)
    model["one"].layers[1].linear2 = own
    switch_on(model)
    for module, attributes in zip(model.modules(), before, strict=True):
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[key] is value for key, value in attributes.items())


def test_a_copy_can_be_switched_on():
    model = encoder()
    model.layers[0].linear1 = Adapted(16, 24)
    switch_off(model, adapted)
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    switch_on(other)
    assert other.layers[0].activation_relu_or_gelu == 1
    assert other.use_nested_tensor
    assert is_off(model.layers[0])


def test_a_layer_without_the_path_and_other_modules():
    layer = nn.TransformerEncoderLayer(16, 2, 24, activation=torch.tanh)
    assert is_off(layer)
    assert is_off(nn.Linear(2, 2)) is None
    switch_off(layer, lambda module: True)
    switch_on(layer)
    assert layer.activation_relu_or_gelu == 0
