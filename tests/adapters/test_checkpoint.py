"""save_adapter and load_adapter on a model of ours: what comes back, what is converted, what is left alone."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_kernels.adapters import load_adapter, merge_lora, save_adapter, unmerge_lora
from lora_kernels.adapters.files import CONFIG_NAME, WEIGHTS_NAME
from lora_kernels.config import LoRAConfig
from lora_kernels.errors import AdapterFormatError, ConfigError, MergeError
from lora_kernels.finetune import LoRA
from lora_kernels.layers import LoRALinear
from lora_kernels.models.inject import apply_lora


def test_keys_are_pefts(toy: Any, folder: Path) -> None:
    tensors, config = toy.contents(folder)
    layers = [f"base_model.model.blocks.{i}.{name}" for i in (0, 1) for name in ("q", "v")]
    expected = {f"{layer}.lora_{x}.weight" for layer in layers for x in "AB"}
    expected |= {f"{layer}.base_layer.bias" for layer in layers if layer.endswith("q")}
    batch_norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected |= {f"base_model.model.head.0.{x}" for x in ("weight", "bias")}
    expected |= {f"base_model.model.head.1.{x}" for x in batch_norm}
    assert tensors.keys() == expected
    assert (config["inference_mode"], config["peft_type"]) == (True, "LORA")
    assert (config["base_model_name_or_path"], config["r"]) == (None, 2)


@pytest.mark.parametrize("into", ["fresh", "injected"])
def test_what_was_saved_is_loaded(toy: Any, folder: Path, into: str) -> None:
    torch.manual_seed(5)
    model = toy.fresh() if into == "fresh" else apply_lora(toy.fresh(), toy.config)
    assert load_adapter(model, folder) is model
    torch.manual_seed(0)
    source = load_adapter(toy.fresh(), folder)
    assert torch.equal(model(toy.x), source(toy.x))
    assert not torch.allclose(model(toy.x), toy.fresh()(toy.x))
    assert model.get_buffer("head.1.num_batches_tracked") == 7
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_trainable_or_not(toy: Any, folder: Path) -> None:
    assert not any(p.requires_grad for p in load_adapter(toy.fresh(), folder).parameters())
    model = load_adapter(toy.fresh(), folder, trainable=True)
    wanted = {name for name, p in toy.trained().named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted
    model = load_adapter(apply_lora(toy.fresh(), toy.config), folder)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("model", [torch.float64, torch.float32, torch.bfloat16])
def test_any_float_dtype_is_converted_to_the_layers(
    toy: Any, folder: Path, stored: torch.dtype, model: torch.dtype
) -> None:
    tensors, config = toy.contents(folder)
    tensors = {k: t.clamp(-400, 400).to(stored) if t.is_floating_point() else t for k, t in tensors.items()}
    toy.rewrite(folder, tensors, config)
    loaded = load_adapter(toy.fresh(model), folder)
    layer = loaded.get_submodule("blocks.1.q")
    assert isinstance(layer, LoRALinear)
    assert layer.lora_A.dtype == (torch.float32 if model == torch.bfloat16 else model)
    assert torch.equal(layer.lora_A, tensors["base_model.model.blocks.1.q.lora_A.weight"].to(layer.lora_A.dtype))
    assert torch.equal(layer.bias, tensors["base_model.model.blocks.1.q.base_layer.bias"].to(model))


def test_saving_leaves_model_and_merge_alone_and_merged_saves_the_same(toy: Any, tmp_path: Path) -> None:
    model = toy.trained()
    before = toy.state_of(model)
    save_adapter(model, tmp_path / "plain")
    assert toy.state_of(model) == before
    save_adapter(merge_lora(model), tmp_path / "merged")
    names = (WEIGHTS_NAME, CONFIG_NAME)
    assert all((tmp_path / "plain" / n).read_bytes() == (tmp_path / "merged" / n).read_bytes() for n in names)
    with pytest.raises(MergeError, match="unmerge_lora"):
        load_adapter(model, tmp_path / "plain")
    assert toy.state_of(unmerge_lora(model)) == before


def test_through_wrappers(toy: Any, tmp_path: Path) -> None:
    model = toy.trained()
    save_adapter(nn.DataParallel(model), tmp_path / "a")
    save_adapter(torch.compile(model), tmp_path / "b")
    save_adapter(LoRA(toy.fresh(), toy.config), tmp_path / "c")
    assert json.loads((tmp_path / "c" / CONFIG_NAME).read_text())["auto_mapping"]["base_model_class"] == "Sequential"
    assert (tmp_path / "a" / WEIGHTS_NAME).read_bytes() == (tmp_path / "b" / WEIGHTS_NAME).read_bytes()
    other = apply_lora(toy.fresh(), toy.config)
    load_adapter(nn.DataParallel(other), tmp_path / "a")
    assert torch.equal(other.get_parameter("blocks.0.q.lora_B"), model.get_parameter("blocks.0.q.lora_B"))


def test_what_cannot_be_saved_is_refused_and_the_folder_keeps_what_it_has(toy: Any, folder: Path) -> None:
    kept = (folder / WEIGHTS_NAME).read_bytes()
    with pytest.raises(ConfigError, match="apply_lora"):
        save_adapter(toy.fresh(), folder)
    for name in ("blocks.1.v.lora_B", "blocks.0.q.bias", "head.0.weight"):
        model = toy.trained()
        model.get_parameter(name).data.view(-1)[3] = math.inf
        with pytest.raises(AdapterFormatError, match="NaN or infinity; nothing was written"):
            save_adapter(model, folder)
    model = toy.trained()
    model.get_submodule("blocks.0.q").scaling = 9.0
    with pytest.raises(ConfigError, match=r"blocks\.0\.q is no longer"):
        save_adapter(model, folder)
    assert (folder / WEIGHTS_NAME).read_bytes() == kept


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"r": 3}, r"blocks\.0\.q: the adapter has r=2, scaling=3; the model r=3"),
        ({"lora_alpha": 2}, "the adapter has r=2, scaling=3; the model r=2, 1"),
        ({"use_rslora": True}, "the adapter has r=2, scaling=3"),
        ({"target_modules": ["q"]}, r"the adapter adapts blocks\.0\.v and the model does not"),
        ({"bias": "all"}, "the adapter has bias='lora_only'"),
        ({"modules_to_save": None}, r"modules_to_save=\['head'\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=True; the model"),
    ],
)
def test_adapter_of_a_differently_injected_model_is_refused(
    toy: Any, folder: Path, other: dict[str, Any], says: str
) -> None:
    model = apply_lora(toy.fresh(), LoRAConfig(**{**vars(toy.config), **other}))
    before = toy.state_of(model)
    with pytest.raises(AdapterFormatError, match=says):
        load_adapter(model, folder)
    assert toy.state_of(model) == before


def test_failing_initialisation_takes_everything_back(toy: Any, tmp_path: Path) -> None:
    config = LoRAConfig(r=2, target_modules=["q", "v"], init_lora_weights="olora")
    save_adapter(apply_lora(toy.fresh(), config), tmp_path)
    model = toy.fresh()
    model.get_parameter("blocks.1.v.weight").data[0, 0] = math.nan  # found only after three layers were decomposed
    before = toy.state_of(model)
    with pytest.raises(AdapterFormatError, match=r"blocks\.1\.v: init_lora_weights='olora'"):
        load_adapter(model, tmp_path)
    assert toy.state_of(model) == before


def test_interrupted_while_injecting_takes_everything_back(
    toy: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_kernels.adapters import checkpoint

    def interrupted(*arguments: Any) -> None:
        original(*arguments)
        raise KeyboardInterrupt

    original, model = checkpoint.inject, nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1)
    save_adapter(apply_lora(copy.deepcopy(model), LoRAConfig(target_modules="all-linear")), folder)
    monkeypatch.setattr(checkpoint, "inject", interrupted)
    before = toy.state_of(model)
    with pytest.raises(KeyboardInterrupt):
        load_adapter(model, folder)
    assert toy.state_of(model) == before
    assert model.use_nested_tensor


drawn_configs = st.builds(
    LoRAConfig,
    r=st.integers(1, 6),
    lora_alpha=st.floats(-64, 64),
    use_rslora=st.booleans(),
    bias=st.sampled_from(["none", "all", "lora_only"]),
    target_modules=st.sampled_from([["q"], ["q", "v"], r".*\.[qv]", r".*\.[qv]|head\.0"]),
    rank_pattern=st.sampled_from([{}, {"q": 5, "1.v": 1}]),
    modules_to_save=st.sampled_from([None, ["head"], ["head.1"]]),
    init_lora_weights=st.sampled_from([True, False, "gaussian"]),
)


@settings(max_examples=60)
@given(config=drawn_configs)
@pytest.mark.filterwarnings("ignore:rank_pattern")
def test_any_configuration_comes_back(toy: Any, tmp_path: Path, config: LoRAConfig) -> None:
    model = toy.trained(config=config)
    save_adapter(model, tmp_path)
    other = load_adapter(toy.fresh(), tmp_path, trainable=True)
    untouched = model.get_buffer("head.1.num_batches_tracked")
    other.get_buffer("head.1.num_batches_tracked").copy_(untouched)
    assert torch.equal(other(toy.x), model(toy.x))
    assert {n: p.requires_grad for n, p in other.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    save_adapter(copy.deepcopy(other), tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS_NAME).read_bytes() == (tmp_path / WEIGHTS_NAME).read_bytes()


@pytest.mark.parametrize("how", ["load_adapter", "apply_lora", "into layers that are there"])
def test_what_is_made_in_inference_mode_can_be_trained(toy: Any, folder: Path, how: str) -> None:
    expected = load_adapter(toy.fresh(), folder, trainable=True)
    model = load_adapter(toy.fresh(), folder, trainable=True) if how.startswith("into") else toy.fresh()
    with torch.inference_mode():
        model = apply_lora(model, toy.config) if how == "apply_lora" else load_adapter(model, folder, trainable=True)
    load_adapter(model, folder)
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert not ours.is_inference(), name
        assert ours.requires_grad == theirs.requires_grad, name
        assert torch.equal(ours, theirs), name
    model(toy.x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_module_made_in_inference_mode_cannot_be_trained_whole(toy: Any, folder: Path) -> None:
    with torch.inference_mode():
        model = toy.fresh()
    with pytest.raises(ConfigError, match=r"head.0.weight was created in torch.inference_mode and cannot be trained"):
        load_adapter(model, folder, trainable=True)
    with torch.inference_mode():
        load_adapter(model, folder)
        found = model(toy.x)
    assert torch.equal(found, load_adapter(toy.fresh(), folder)(toy.x))
