"""Tests the function that reads an adapter of a linear layer, a convolution or an embedding."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_kernels.integrations.peft.adapter import read_adapter

KINDS = {nn.Linear: (6, 10), nn.Conv2d: (6, 10, 3), nn.Embedding: (6, 10)}


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.inner = kind(*KINDS[kind])


def layer(kind, **config):
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["inner"], **config}
    return get_peft_model(Net(kind), LoraConfig(**config)).base_model.model.inner


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_weights_scaling_and_no_dropout_without_one(kind):
    found = layer(kind)
    A, B, bias, scaling, p = read_adapter(found, "default", torch.float32, kind)
    held = [module["default"] for name, module in found.named_children() if name.startswith("lora_") and len(module)]
    assert [id(A), id(B)] == [id(getattr(each, "weight", each)) for each in held if not isinstance(each, nn.Identity)]
    assert (bias, scaling, p) == (None, 1.5, 0.0)


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d], ids=lambda kind: kind.__name__)
def test_bias_and_the_present_p_of_dropout(kind):
    found = layer(kind, lora_bias=True, lora_dropout=0.25)
    _, _, bias, _, p = read_adapter(found, "default", torch.float32, kind)
    assert bias is found.lora_B["default"].bias
    assert p == 0.25
    assert read_adapter(found.eval(), "default", torch.float32, kind)[-1] == 0.0


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    ("dropout", "reason"),
    [
        (nn.Dropout(0.1, inplace=True), "its dropout works in place"),
        (nn.AlphaDropout(), "its dropout is a AlphaDropout"),
    ],
    ids=["in place", "alpha"],
)
def test_dropouts_that_are_pefts(kind, dropout, reason):
    found = layer(kind)
    found.lora_dropout["default"] = dropout
    assert read_adapter(found, "default", torch.float32, kind) == reason


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_weights_that_the_kernels_cannot_read(kind):
    found = layer(kind)
    found.to("meta")
    assert "meta" in read_adapter(found, "default", torch.float32, kind)


def test_modules_of_another_kind_and_casting_that_is_off():
    found = layer(nn.Linear)
    assert "both must be nn.Conv1d" in read_adapter(found, "default", torch.float32, nn.Conv1d)
    found.cast_input_dtype_enabled = False
    assert "casting its input" in read_adapter(found, "default", torch.bfloat16)
