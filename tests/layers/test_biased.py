"""A linear layer whose update has a bias."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_kernels.config import LoRAConfig
from lora_kernels.errors import ConfigError
from lora_kernels.layers import BiasedLoRALinear, LoRALinear
from lora_kernels.testing.rule import assert_close


def made(dtype: torch.dtype = torch.float64, bias: bool = True) -> BiasedLoRALinear:
    torch.manual_seed(0)
    layer = BiasedLoRALinear(24, 40, r=4, lora_alpha=6, bias=bias, init_lora_weights=False, dtype=dtype)
    with torch.no_grad():
        layer.lora_bias.normal_()
    return layer


def plain(layer: BiasedLoRALinear, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    W, A, B, b = (t.to(dtype) for t in (layer.weight, layer.lora_A, layer.lora_B, layer.lora_bias))
    bias = None if layer.bias is None else layer.bias.to(dtype)
    update = nn.functional.linear(x.to(dtype) @ A.t(), B, b)
    return nn.functional.linear(x.to(dtype), W, bias) + layer.scaling * update


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_by_the_rule(dtype: torch.dtype, bias: bool) -> None:
    layer, x = made(dtype, bias), torch.randn(64, 24).to(dtype)
    with torch.no_grad():
        expected, truth = plain(layer, x, dtype), plain(layer, x, torch.float64)
        assert_close(layer(x), expected, truth)
        merged = copy.deepcopy(layer)
        merged.merge()
        assert_close(merged(x), expected, truth)
        merged.unmerge()
        assert torch.equal(merged(x), layer(x))


@pytest.mark.parametrize("bias", [True, False])
def test_gradients(bias: bool) -> None:
    layer, x = made(bias=bias), torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    if bias:
        layer.bias.requires_grad_()
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    found = torch.autograd.grad(layer(x).pow(2).sum(), wanted)
    expected = torch.autograd.grad(plain(layer, x, torch.float64).pow(2).sum(), wanted)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_it_starts_as_its_base_and_a_plain_layer_refuses_the_setting() -> None:
    linear = nn.Linear(6, 5)
    layer = BiasedLoRALinear.from_linear(linear, LoRAConfig(lora_bias=True))
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), nn.functional.linear(x, linear.weight, linear.bias))
    assert BiasedLoRALinear.adapter_parameters == ("lora_A", "lora_B", "lora_bias")
    with pytest.raises(ConfigError, match="use BiasedLoRALinear"):
        LoRALinear.from_linear(linear, LoRAConfig(lora_bias=True))
