import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer

from lora_kernels.check.compat.families import FAMILIES, fill_adapters

EACH = pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)


def adapted(family, targets, seed=0, **options):
    model, inputs = family.build(seed)
    config = LoraConfig(target_modules=list(targets), r=4, lora_alpha=8, task_type=family.task or None, **options)
    torch.manual_seed(seed)
    return get_peft_model(model, config), inputs


@EACH
def test_every_adapter_of_a_family_matters_and_learns(family):
    model, inputs = adapted(family, family.linear)
    unadapted = model(**inputs).logits
    fill_adapters(model)
    out = model(**inputs)
    assert (out.logits - unadapted).square().mean() > 0.1 * unadapted.square().mean()
    out.loss.backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any() or family.name == "Mixtral", name


@EACH
def test_every_named_target_is_a_layer_of_the_model(family):
    for targets in (family.attention, family.linear):
        model, _ = adapted(family, targets)
        names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LoraLayer)}
        assert names == set(targets)


@EACH
def test_the_same_seed_is_the_same_model_and_batch(family):
    state = torch.random.get_rng_state()
    (first, inputs), (second, again), (other, _) = family.build(3), family.build(3), family.build(4)
    assert torch.equal(torch.random.get_rng_state(), state)
    values = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (first, second, other)]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
    assert inputs.keys() == again.keys()
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)
    assert first.training
    assert torch.equal(first(**inputs).logits, first(**inputs).logits)  # no dropout of its own


def test_settings_replace_those_of_the_family():
    assert FAMILIES["Llama"].model(num_hidden_layers=1).config.num_hidden_layers == 1


def test_filled_terms_are_as_large_as_the_base():
    family = FAMILIES["Llama"]
    model, _ = adapted(family, family.linear)
    fill_adapters(model)
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
    X = torch.randn(500, layer.in_features)
    base = X @ layer.base_layer.weight.T
    low_rank = layer.scaling["default"] * layer.lora_B["default"](layer.lora_A["default"](X))
    assert 0.6 < low_rank.norm() / base.norm() < 1.6


def test_embeddings_and_convolutions_are_filled():
    gpt, inputs = adapted(FAMILIES["GPT-2"], ["wte"])
    vit, pixels = adapted(FAMILIES["ViT"], ["projection"])
    for model, batch in ((gpt, inputs), (vit, pixels)):
        before = model(**batch).logits
        fill_adapters(model)
        assert (model(**batch).logits - before).square().mean() > 0.1 * before.square().mean()
