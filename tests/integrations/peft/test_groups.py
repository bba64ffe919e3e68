"""Tests siblings that run together: which layers they are, and the same numbers as PEFT's."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_kernels.check.compat.families import FAMILIES, fill_adapters
from lora_kernels.check.compat.judge import errors, fault
from lora_kernels.integrations.peft import accelerate, groups
from lora_kernels.integrations.peft.groups import dissolve, form_groups, groups_of
from tests.integrations.peft.siblings import (
    K,
    Stack,
    adapted,
    attention,
    example,
    gradients,
    learned,
    same,
    twins,
    with_another,
)

pytestmark = pytest.mark.usefixtures("nothing_left_over")


TOGETHER = {
    "BERT": ["query + key + value"],
    "RoBERTa": ["query + key + value"],
    "GPT-2": [],
    "Llama": ["gate_proj + up_proj", "q_proj + k_proj + v_proj"],
    "Qwen2": ["gate_proj + up_proj", "q_proj + k_proj + v_proj"],
    "T5": ["k + v", "q + k + v", "wi_0 + wi_1"],
    "Marian": ["k_proj + v_proj", "k_proj + v_proj + q_proj"],
    "ViT": ["q_proj + k_proj + v_proj"],
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", TOGETHER)
def test_families_compute_what_peft_computes(name):
    family = FAMILIES[name]
    config = LoraConfig(
        r=4, target_modules=list(family.linear), task_type=family.task or None, fan_in_fan_out=name == "GPT-2"
    )

    def results(model, inputs):
        model.zero_grad()
        out = model(**inputs)
        out.loss.backward()
        grads = {f"{name.split('.')[-3]}:{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"logits": out.logits.detach().clone(), **grads}

    draws = []
    for seed in range(3):
        base, inputs = family.build(seed)
        plain = get_peft_model(base, config)
        fill_adapters(plain, seed)
        ours = accelerate(copy.deepcopy(plain), verbose=False, group=False)  # no gated MLP in one call
        found = form_groups(ours)
        double = {key: v.double() if v.is_floating_point() else v for key, v in inputs.items()}
        truth, expected = results(copy.deepcopy(plain).double(), double), results(plain, inputs)
        for _ in range(2):  # layer by layer, then together
            draws.append(errors(results(ours, inputs), expected, truth, torch.float32))
            assert groups.unclaimed.made is None
    assert fault(draws, torch.float32) is None, fault(draws, torch.float32)
    assert sorted({" + ".join(run) for group in found for run in group.together()}) == TOGETHER[name]


def test_a_forward_shows_who_reads_what_and_the_next_ones_run_together(counted):
    model = adapted()
    first = gradients(model, example())
    assert counted == [1] * 8
    assert all("one by one" in group.describe() for group in groups_of(model))
    counted.clear()
    same(gradients(model, example()), first)
    assert counted == [3, 1, 3, 1]
    assert groups_of(model)[0].together() == (("q", "k", "v"),)
    assert groups_of(model)[0].describe().endswith("layers.0: q + k + v in one call")


@pytest.mark.parametrize("order", ["vkq", "kqv"])
def test_any_order(counted, order):
    model = learned(adapted())
    expected = gradients(model, example())
    for layer in model.base_model.model.layers:
        layer.order = order
    counted.clear()
    same(gradients(model, example()), expected)
    assert counted == [3, 1, 3, 1]


@pytest.mark.parametrize("case", ["merged", "disabled", "hook", "pre_hook", "patched", "deep_hook"])
def test_a_sibling_in_another_state_goes_alone(counted, case):
    model, twin = twins()
    seen = []
    for m in (model, twin):
        layer = attention(m).k
        if case == "merged":
            layer.merge()
        elif case == "disabled":
            layer.enable_adapters(False)
        elif case == "hook":
            layer.register_forward_hook(lambda module, args, y: 2 * y)
        elif case == "pre_hook":
            layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        elif case == "patched":
            layer.forward = lambda x, old=layer.forward: old(x) + 1
        else:
            layer.lora_A["default"].register_forward_hook(lambda module, args, y: seen.append(1))
    counted.clear()
    same(gradients(model, example()), gradients(twin, example()))
    assert counted[:2] == [2, 1]
    assert bool(seen) == (case == "deep_hook")


def test_adapters_of_their_own_rank_and_dtype(counted):
    model, twin = twins(rank_pattern={"k": 2}, alpha_pattern={"v": 3})
    counted.clear()
    same(gradients(model, example()), gradients(twin, example()))
    assert counted[0] == 3
    for m in (model, twin):
        for part in (attention(m).v.lora_A, attention(m).v.lora_B):
            part["default"].double()
    counted.clear()
    same(gradients(model, example()), gradients(twin, example()))
    assert counted[:2] == [2, 1]


def test_several_active_adapters_run_together(counted):
    def both(model):
        with_another(model)
        model.base_model.set_adapter(["default", "other"])

    model, twin = twins(both)
    counted.clear()
    same(gradients(model, example()), gradients(twin, example()))
    assert counted[:4] == [3, 1, 3, 1]


def test_a_layer_that_is_two_siblings_at_once(counted):
    """Use the keys as values: one module, called twice with one tensor."""
    model, twin = adapted(), adapted(group=False)
    for m in (model, twin):
        for layer in m.base_model.model.layers:
            layer.order = "qkkv"
    for _ in range(4):
        counted.clear()
        same(gradients(model, example()), gradients(twin, example()))
    assert counted[:4] == [2, 1, 1, 1]  # q with v; k alone, twice; o


def test_siblings_under_two_parents_have_one_group():
    def share(model):
        blocks = model.base_model.model.layers
        blocks[1].q = blocks[0].q
        form_groups(model)

    model, twin = twins(share)
    assert [group.names for group in groups_of(model)] == [("q", "k", "v", "o"), ("k", "v", "o")]
    for _ in range(4):
        same(gradients(model, example()), gradients(twin, example()))


def test_inputs_that_are_not_shared_are_not_grouped(counted):
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(K, K), nn.Linear(K, K)

        def forward(self, x):
            return self.k(self.q(x))

    model = adapted(Apart())
    for _ in range(6):
        model(example())
    assert set(counted) == {1}
    assert groups_of(model)[0].describe().endswith("read inputs apart")


def test_generate_with_a_cache(counted):
    for name in ("Llama", "T5"):
        family = FAMILIES[name]
        base, inputs = family.build()
        plain = get_peft_model(base, LoraConfig(r=4, target_modules=list(family.linear), task_type=family.task))
        fill_adapters(plain)
        ours = accelerate(copy.deepcopy(plain), verbose=False)
        form_groups(ours)
        inputs.pop("labels")
        for m in (plain.eval(), ours.eval()):
            m.generation_config.pad_token_id = 0
        expected = plain.generate(**inputs, max_new_tokens=6, do_sample=False)
        for _ in range(2):
            assert torch.equal(ours.generate(**inputs, max_new_tokens=6, do_sample=False), expected)
        assert set(counted) == {1}  # on a CPU nothing is saved without gradients and without dropout
        inputs["labels"] = inputs["input_ids"]
        ours(**inputs)
        assert 3 in counted
        counted.clear()


def test_formed_again_dissolved_and_late_layers():
    model = adapted()
    before = groups_of(model)
    assert [g is h for g, h in zip(form_groups(learned(model)), before, strict=True)] == [True, True]
    assert before[0].sharing.partners is not None
    dissolve(model)
    assert groups_of(model) == []
    assert all("_lora_group" not in vars(module) for module in model.modules())
    part = get_peft_model(Stack(), LoraConfig(target_modules=["q"]))
    accelerate(part, verbose=False)
    assert form_groups(part) == []
    part.add_adapter("more", LoraConfig(target_modules=["v", "k"]))
    part.base_model.set_adapter(["default", "more"])
    accelerate(part, verbose=False)
    assert [group.names for group in form_groups(part)] == [("q", "k", "v")] * 2
    block = attention(part)
    block.k, block.v = nn.Linear(K, 8), nn.Linear(K, 8)
    assert [group.names for group in form_groups(part)] == [("q", "k", "v")]
    assert "_lora_group" not in vars(block.q)
