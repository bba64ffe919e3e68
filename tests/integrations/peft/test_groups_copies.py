"""Tests copies of siblings that run together, of all and of single ones."""

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn

from lora_kernels.integrations.peft.groups import form_groups, groups_of
from tests.integrations.peft.siblings import K, adapted, attention, example, gradients, learned, same

pytestmark = pytest.mark.usefixtures("nothing_left_over")


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("knows", [True, False])
def test_copies_are_whole_and_independent(how, knows, counted):
    model = learned(adapted()) if knows else adapted()
    expected = gradients(adapted(group=False), example())
    for layer in model.base_model.model.layers:
        del layer.between  # a lambda does not pickle
    twin = copied(model, how)
    for m in (model, twin):
        for layer in m.base_model.model.layers:
            layer.between = lambda x: None
    pairs = list(zip(groups_of(model), groups_of(twin), strict=True))
    assert len(pairs) == 2
    for old, new in pairs:
        assert old is not new
        assert old.sharing.partners == new.sharing.partners
        assert all(a() is not b() for a, b in zip(old.layers, new.layers, strict=True))
    with torch.no_grad():
        for q in model.parameters():
            q.zero_()
    counted.clear()
    for _ in range(2):
        same(gradients(twin, example()), expected)
    assert counted[:4] == ([3, 1, 3, 1] if knows else [1, 1, 1, 1])
    assert counted[-4:] == [3, 1, 3, 1]
    assert len(form_groups(twin)) == 2


def copied(thing, how):
    if how == "deepcopy":
        return copy.deepcopy(thing)
    if how == "pickle":
        return pickle.loads(pickle.dumps(thing))
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copied_layer_does_not_drag_its_siblings_along(how, counted):
    model = learned(adapted())
    layer = attention(model).k
    twin = copied(layer, how)
    assert sum(ref is not None for ref in twin.__dict__["_lora_group"].group.layers) == 1
    counted.clear()
    torch.testing.assert_close(twin(example()), layer(example()))
    assert counted == [1, 3]


def test_a_replica_goes_alone(counted):
    model = learned(adapted())
    block = attention(model)
    replica = block.k._replicate_for_data_parallel()
    replica._modules, replica._parameters = dict(block.k._modules), dict(block.k._parameters)
    counted.clear()
    torch.testing.assert_close(replica(example()), copy.copy(block.k)(example()))
    assert counted == [1, 1]


def test_a_sibling_taken_out_of_the_model(counted):
    model = learned(adapted())
    block = attention(model)
    block.k = nn.Linear(K, 8)
    gc.collect()
    counted.clear()
    model(example())
    assert counted == [2, 1, 3, 1]
    assert form_groups(model)[0].names == ("q", "v", "o")
