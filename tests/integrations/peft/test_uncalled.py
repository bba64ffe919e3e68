"""Tests modules that read the weight of an adapted layer instead of calling it."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_kernels as lk
from lora_kernels.check.compat.families import fill_adapters
from lora_kernels.errors import ConfigError
from lora_kernels.integrations.peft.linear import UNCALLED

TARGETS = {"linears": ["linear1", "linear2"], "one": ["linear1"], "attention": ["self_attn"]}


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def wrapped(targets, base=None):
    torch.manual_seed(0)
    model = get_peft_model(encoder() if base is None else base, LoraConfig(r=2, target_modules=targets))
    fill_adapters(model)
    return model.eval()


def inputs():
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    return x, padding


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", TARGETS)
def test_the_encoder_in_eval_mode_has_its_adapters(name, masked, grad):
    """PEFT alone ignores the adapters here. The truth is the merged model."""
    model, (x, padding) = wrapped(TARGETS[name]), inputs()
    padding = padding if masked else None
    bare = copy.deepcopy(model)
    before = {path: dict(vars(m)) for path, m in model.named_modules()}
    merged = copy.deepcopy(model).merge_and_unload()
    lk.accelerate(model, verbose=False)
    with torch.set_grad_enabled(grad):
        expected = merged(x, src_key_padding_mask=padding)
        kept = ~padding if masked else torch.ones(3, 5, dtype=torch.bool)
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[kept], expected[kept])
        ignored = bare(x, src_key_padding_mask=padding)
        assert (ignored - expected)[kept].abs().max() > 1e-2
        lk.decelerate(model)
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[kept], ignored[kept])
    assert {path: vars(m).keys() for path, m in model.named_modules()} == {p: a.keys() for p, a in before.items()}
    for path, layer in model.named_modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            assert layer.activation_relu_or_gelu == before[path]["activation_relu_or_gelu"] == 1


def test_explain_before_and_after():
    model = wrapped(["linear1"])
    ignores = "layers.0-1: in eval mode its inference path ignores adapters; accelerate switches it off"
    assert ignores in lk.explain(model)
    lk.accelerate(model, verbose=False)
    assert "layers.0-1: its inference path, which reads weights and calls no adapter, is off" in lk.explain(model)
    lk.decelerate(model)
    assert ignores in lk.explain(model)
    assert "inference path" not in lk.explain(encoder())


def test_layers_that_a_later_adapter_brings():
    base = nn.ModuleDict({"first": nn.Linear(16, 16), "encoder": encoder()})
    model = wrapped(["first"], base)
    lk.accelerate(model, verbose=False)
    assert base["encoder"].use_nested_tensor
    model.add_adapter("late", LoraConfig(r=2, target_modules=["linear1"]))
    assert not base["encoder"].use_nested_tensor
    assert base["encoder"].layers[0].activation_relu_or_gelu == 0


def test_strict_that_fails_leaves_the_path_on():
    model = wrapped(["self_attn"])
    with pytest.raises(ConfigError, match="strict=True"):
        lk.accelerate(model, strict=True, verbose=False)
    assert model.base_model.model.use_nested_tensor
    assert all(UNCALLED not in vars(module) for module in model.modules())


def test_the_output_projection_of_attention_is_never_called():
    model = wrapped(["out_proj"], nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2, batch_first=True)}))
    lk.accelerate(model, verbose=False)
    told = lk.explain(model)
    assert "its adapter has no effect: nn.MultiheadAttention reads its weight and never calls it" in told
    assert "fused" not in told
    with pytest.raises(ConfigError, match="has no effect"):
        lk.accelerate(model, strict=True, verbose=False)
    lk.decelerate(model)
    assert all(UNCALLED not in vars(module) for module in model.modules())


def test_pefts_own_attention_merges_it():
    model = wrapped(["self_attn"])
    lk.accelerate(model, verbose=False)
    told = lk.explain(model)
    assert "PEFT's MultiheadAttention merges it into the weight at each call" in told
    assert "MultiheadAttention has no fused path" in told


class WavLMAttention(nn.Module):
    """Use the layers as transformers' class of this name does."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.out_proj, self.gate = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return nn.functional.linear(self.gate(x), self.out_proj.weight @ self.q_proj.weight)


def test_layers_whose_weights_are_given_to_a_function():
    base = nn.Sequential(WavLMAttention())
    model = wrapped(["q_proj", "out_proj", "gate"], copy.deepcopy(base))
    lk.accelerate(model, verbose=False)
    told = lk.explain(model)
    assert told.count("has no effect: WavLMAttention reads its weight and never calls it") == 2
    assert told.count("fused") == 1
    with pytest.raises(ConfigError, match="never be called: WavLMAttention reads its weight"):
        lk.apply_lora(copy.deepcopy(base), lk.LoRAConfig(target_modules=["q_proj"]))
