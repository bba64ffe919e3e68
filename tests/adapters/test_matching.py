"""The keys that a file must hold for a model, and its values where modules share a weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lora_kernels.adapters.matching import check_shared, check_tensors, converted, is_finite, keys_of, with_replaced
from lora_kernels.config import LoRAConfig
from lora_kernels.errors import AdapterFormatError
from lora_kernels.models.inject import apply_lora, plan_injection

BASE = "base_model.model."


def test_keys_of_every_kind_of_tensor(toy: Any) -> None:
    config = LoRAConfig(target_modules=["q"], modules_to_save=["head"], bias="lora_only", lora_bias=True)
    model = toy.fresh()
    injection = plan_injection(model, config)
    names = keys_of(model, injection)
    assert names[f"{BASE}blocks.0.q.lora_B.bias"] == "blocks.0.q.lora_bias"
    assert names[f"{BASE}blocks.0.q.base_layer.bias"] == "blocks.0.q.bias"
    assert names[f"{BASE}head.0.weight"] == "head.0.weight"
    assert set(names.values()) <= set(apply_lora(model, config).state_dict())
    assert with_replaced(model, injection, names, {}) == (injection, names)


def test_tensors_are_checked_against_their_places(toy: Any) -> None:
    model = toy.fresh()
    injection = plan_injection(model, LoRAConfig(target_modules=["blocks.0.q"], r=2, lora_bias=True))
    names = keys_of(model, injection)
    sizes = {"lora_A.weight": (2, 8), "lora_B.weight": (6, 2), "lora_B.bias": (6,)}
    tensors = {f"{BASE}blocks.0.q.{end}": torch.zeros(size) for end, size in sizes.items()}
    check_tensors(model, injection, names, tensors)
    with pytest.raises(AdapterFormatError, match=r"lora_B.bias has shape \(1,\), expected \(6,\)"):
        check_tensors(model, injection, names, tensors | {f"{BASE}blocks.0.q.lora_B.bias": torch.zeros(1)})


def test_one_weight_has_one_value() -> None:
    weight = torch.zeros(3)
    state = {"a": weight, "b": weight, "c": torch.zeros(3)}
    check_shared(state, {"a": torch.ones(3), "b": torch.ones(3), "c": torch.zeros(3)})
    with pytest.raises(AdapterFormatError, match="b and a are one weight"):
        check_shared(state, {"a": torch.ones(3), "b": torch.zeros(3)})


def test_conversion_and_finiteness() -> None:
    like = nn.Linear(1, 1).half().weight
    assert converted("k", torch.ones(1, 1), like).dtype == torch.float16
    with pytest.raises(AdapterFormatError, match=r"k holds numbers too large for torch\.float16"):
        converted("k", torch.full((1, 1), 1e6), like)
    assert is_finite(torch.ones(2, dtype=torch.int8))
    assert is_finite(torch.ones(2).to(torch.float8_e4m3fn))
    assert not is_finite(torch.tensor(float("nan")))
