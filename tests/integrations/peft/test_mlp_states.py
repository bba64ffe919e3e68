"""Tests gated MLPs in other states: merged, hooked, replaced, with adapters added and deleted."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_kernels.check.compat.families import fill_adapters
from lora_kernels.integrations.peft import accelerate
from lora_kernels.integrations.peft.mlp import mlps_of
from tests.integrations.peft.gated import TARGETS, F, Gated, K, Net, adapted, blocks, example, gradients, same, twins


def merged(model):
    blocks(model)[0].c.merge()


def disabled(model):
    blocks(model)[0].b.enable_adapters(False)


def another_dropout(model):
    blocks(model)[0].b.lora_dropout["default"] = nn.Dropout(1.0)
    blocks(model)[0].a.lora_A["default"].weight.data.zero_()


def another_dtype(model):
    for part in (blocks(model)[0].b.lora_A, blocks(model)[0].b.lora_B):
        part["default"].double()


def late_hook(model):
    blocks(model)[0].b.register_forward_hook(lambda module, args, y: 2 * y)


def late_hook_on_the_activation(model):
    blocks(model)[0].act.register_forward_hook(lambda module, args, y: 2 * y)


def late_hook_inside(model):
    blocks(model)[0].c.base_layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def another_activation(model):
    blocks(model)[0].act = nn.Tanh()


def replaced(model):
    blocks(model)[0].b = nn.Linear(K, F)


def parametrized(model):
    nn.utils.parametrizations.weight_norm(blocks(model)[0].a.base_layer)


def trained_base(model):
    blocks(model)[0].c.base_layer.weight.requires_grad_(True)


STATES = [merged, disabled, another_dropout, another_dtype, late_hook, late_hook_on_the_activation, late_hook_inside]


@pytest.mark.parametrize(
    "change", [*STATES, another_activation, replaced, parametrized, trained_base], ids=lambda f: f.__name__
)
def test_a_block_in_another_state_takes_its_own_forward(change, whole):
    model, twin = twins()
    for m in (model, twin):
        torch.manual_seed(4)
        change(m)
    same(gradients(model), gradients(twin))
    assert len(whole) == 1


def test_hooks_on_the_block_itself_and_calls_by_keyword(whole):
    model, twin = twins()
    for m in (model, twin):
        blocks(m)[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
        blocks(m)[0].register_forward_hook(lambda module, args, y: y + 1)
        blocks(m)[1].register_full_backward_hook(lambda module, got, given: (got[0] * 3,))
    same(gradients(model), gradients(twin))
    assert len(whole) == 2
    torch.testing.assert_close(blocks(model)[1](x=example()), blocks(twin)[1](x=example()))
    block = blocks(model)[0]
    block.forward = lambda x: x
    assert torch.equal(block(example()), 2 * example() + 1)
    assert len(whole) == 2


def test_adapters_that_come_and_go(whole):
    model = adapted()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["a", "c"]))
    fill_adapters(model)
    twin = accelerate(copy.deepcopy(model), verbose=False, group=False)
    steps = (
        (lambda m: m.set_adapter("other"), 0),  # up has none
        (lambda m: m.base_model.set_adapter(["default", "other"]), 2),
        (lambda m: m.set_adapter("default"), 2),
        (lambda m: m.delete_adapter("other"), 2),
    )
    for step, expected in steps:
        whole.clear()
        for m in (model, twin):
            step(m)
        same(gradients(model), gradients(twin))
        assert len(whole) == expected
    base = model.merge_and_unload()
    torch.testing.assert_close(base(example()), twin.merge_and_unload()(example()))


def test_layers_that_come_later_are_picked_up(whole):
    model = accelerate(get_peft_model(Net(), LoraConfig(r=4, target_modules=["a"])), verbose=False)
    assert mlps_of(model) == {}
    model.add_adapter("all", LoraConfig(r=4, target_modules=TARGETS))
    model.set_adapter("all")
    fill_adapters(model)
    twin = accelerate(copy.deepcopy(model), verbose=False, group=False)
    same(gradients(model), gradients(twin))
    assert len(whole) == 2


def test_a_block_that_changed_is_given_back_at_the_next_accelerate():
    model = adapted()
    another_activation(model)
    assert list(mlps_of(accelerate(model, verbose=False))) == ["base_model.model.blocks.1"]
    assert type(blocks(model)[0]) is Gated
    assert "in one call" not in "".join(blocks(model)[0].a.describe())
