"""merge_lora folds all layers or none; unmerge_lora restores the bits."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from lora_kernels.adapters import merge_lora, unmerge_lora
from lora_kernels.config import LoRAConfig
from lora_kernels.errors import ConfigError, MergeError
from lora_kernels.layers import LoRALinear
from lora_kernels.models.inject import apply_lora


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_merge_computes_the_same_and_unmerge_restores_every_bit(toy: Any, dtype: torch.dtype) -> None:
    model, x = toy.trained(dtype), toy.x.to(dtype)
    before, expected = toy.state_of(model), model(x)
    weights = {path: m.weight for path, m in model.named_modules() if isinstance(m, LoRALinear)}
    assert merge_lora(model) is model
    for path, weight in weights.items():
        layer = model.get_submodule(path)
        exact = weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        ulp = torch.finfo(dtype).eps
        torch.testing.assert_close(layer.weight.double(), exact, rtol=2 * ulp, atol=2 * ulp * exact.abs().max().item())
        assert layer.weight.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 3e-2, torch.bfloat16: 2e-1}[dtype]
    assert (model(x) - expected).abs().max() <= tolerance * expected.abs().max()
    assert unmerge_lora(model) is model
    assert toy.state_of(model) == before
    assert torch.equal(model(x), expected)
    assert all(model.get_submodule(path).weight is weight for path, weight in weights.items())


def test_twice_is_once(toy: Any) -> None:
    model = toy.trained()
    before = toy.state_of(model)
    first = merge_lora(model)(toy.x)
    state = toy.state_of(model)
    assert torch.equal(merge_lora(model)(toy.x), first)
    assert toy.state_of(model) == state
    assert toy.state_of(unmerge_lora(unmerge_lora(model))) == before


def test_partly_merged_models_are_finished(toy: Any) -> None:
    model = toy.trained()
    before, expected = toy.state_of(model), merge_lora(copy.deepcopy(model))(toy.x)
    model.get_submodule("blocks.1.q").merge()
    assert torch.equal(merge_lora(model)(toy.x), expected)
    assert toy.state_of(unmerge_lora(model)) == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["blocks.1.v.lora_A", "blocks.1.v.lora_B", "blocks.1.v.weight"])
def test_what_is_not_finite_is_refused_before_any_layer_is_merged(toy: Any, name: str, value: float) -> None:
    model = toy.trained()
    model.get_parameter(name).data.view(-1)[2] = value
    before = toy.state_of(model)
    with pytest.raises(MergeError, match=r"blocks\.1\.v: .*No layer of the model was merged"):
        merge_lora(model)
    assert toy.state_of(model) == before


def test_overflow_of_a_narrow_weight_is_refused(toy: Any) -> None:
    model = toy.trained(torch.float16)
    model.get_parameter("blocks.0.q.lora_A").data.fill_(300)
    model.get_parameter("blocks.0.q.lora_B").data.fill_(300)
    before = toy.state_of(model)
    with pytest.raises(MergeError, match=r"blocks\.0\.q"):
        merge_lora(model)
    assert toy.state_of(model) == before


def test_interrupted_merge_takes_itself_back(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, merges = toy.trained(), []

    def merge_thrice(layer: LoRALinear) -> None:
        merges.append(layer)
        if len(merges) > 3:
            raise KeyboardInterrupt
        original(layer)

    original, before = LoRALinear.merge, toy.state_of(model)
    monkeypatch.setattr(LoRALinear, "merge", merge_thrice)
    with pytest.raises(KeyboardInterrupt):
        merge_lora(model)
    assert toy.state_of(model) == before


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_merged_copies_unmerge(toy: Any, how: Any) -> None:
    model = toy.trained()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = unmerge_lora(how(merge_lora(model)))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in other.state_dict().items())


def test_tied_embedding_keeps_the_base_weight() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embedding"].weight
    with pytest.warns(UserWarning, match="tied"):
        apply_lora(model, LoRAConfig(r=2, target_modules=["head"], init_lora_weights=False))
    tied = model["embedding"].weight
    before = tied.detach().clone()
    with pytest.warns(UserWarning, match=r"head\.weight is tied to another module"):
        merge_lora(model)
    assert torch.equal(model["embedding"].weight, before)
    assert not torch.equal(model["head"].weight, before)
    assert unmerge_lora(model)["head"].weight is model["embedding"].weight is tied


def test_models_without_lora_and_wrapped_ones(toy: Any) -> None:
    for function in (merge_lora, unmerge_lora):
        with pytest.raises(ConfigError, match="no LoRA layers"):
            function(toy.fresh())
    model = toy.trained()
    wrapped = nn.DataParallel(model)
    assert merge_lora(wrapped) is wrapped
    assert model.get_submodule("blocks.0.q").merged
