"""Adapters that do not fit are refused by key, with the model bit for bit as it was."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_kernels.adapters import load_adapter
from lora_kernels.config import LoRAConfig
from lora_kernels.errors import AdapterFormatError, ConfigError
from lora_kernels.models.explain import injection_of
from lora_kernels.models.inject import apply_lora, plan_injection
from lora_kernels.pool import AdapterPool

A = "base_model.model.blocks.0.q.lora_A.weight"
BIAS = "base_model.model.blocks.0.q.base_layer.bias"
HEAD = "base_model.model.head.0.weight"
COUNT = "base_model.model.head.1.num_batches_tracked"
Change = Callable[[dict[str, Tensor], dict[str, Any]], Any]


def put(key: str, value: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors, config: tensors.update({key: value(tensors[key])})


def drop(key: str) -> Change:
    return lambda tensors, config: tensors.pop(key)


def add(key: str, *shape: int) -> Change:
    return lambda tensors, config: tensors.update({key: torch.zeros(shape)})


def say(**values: Any) -> Change:
    return lambda tensors, config: config.update(values)


def spoil(at: int, value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: torch.where(torch.arange(tensor.numel()).view(tensor.shape) == at, value, tensor)


HOSTILE: dict[str, tuple[Change, str]] = {
    "A missing": (drop(A), f"'{A}' is missing"),
    "bias missing": (drop(BIAS), f"'{BIAS}' is missing"),
    "saved module incomplete": (drop(COUNT), f"'{COUNT}' is missing"),
    "no tensors": (lambda tensors, config: tensors.clear(), "is missing"),
    "key too many": (add("base_model.model.blocks.0.q.lora_C.weight", 1), "lora_C.weight' is in the file but not exp"),
    "layer the model lacks": (add("base_model.model.blocks.2.q.lora_A.weight", 2, 8), "blocks.2.q.* not expected"),
    "magnitudes of DoRA": (add("base_model.model.blocks.0.q.lora_magnitude_vector", 6), "magnitude.* not expected"),
    "key without prefix": (lambda t, c: t.update({A.removeprefix("base_model."): t.pop(A)}), "is missing"),
    "path in a key": (add("../../etc/passwd", 1), "etc/passwd' is in the file but not expected"),
    "long key": (add("k" * 5000, 1), "not expected"),
    "another base weight": (add("base_model.model.blocks.0.q.base_layer.weight", 6, 8), "not expected"),
    "rank of another": (put(A, lambda t: torch.zeros(3, 8)), rf"{A} has shape \(3, 8\), expected \(2, 8\)"),
    "transposed": (put(A, lambda t: t.t()), rf"{A} has shape \(8, 2\), expected \(2, 8\)"),
    "flat": (put(A, lambda t: t.flatten()), rf"{A} has shape \(16,\), expected \(2, 8\)"),
    "empty": (put(A, lambda t: torch.empty(0, 8)), rf"{A} has shape \(0, 8\)"),
    "bias of another shape": (put(BIAS, lambda t: torch.zeros(5)), rf"{BIAS} has shape \(5,\), expected \(6,\)"),
    "head of another shape": (put(HEAD, lambda t: torch.zeros(4, 8)), rf"{HEAD} has shape .*expected \(3, 8\)"),
    "NaN": (put(A, spoil(3, math.nan)), f"{A} holds NaN or infinity"),
    "infinity": (put(HEAD, spoil(0, -math.inf)), f"{HEAD} holds NaN or infinity"),
    "NaN in float8": (put(A, lambda t: spoil(1, math.nan)(t).to(torch.float8_e4m3fn)), "holds NaN"),
    "integers": (put(A, lambda t: t.to(torch.int32)), f"{A} has dtype torch.int32, expected torch.float32"),
    "truth values": (put(BIAS, lambda t: t > 0), f"{BIAS} has dtype torch.bool"),
    "float for a counter": (put(COUNT, lambda t: t.float()), f"{COUNT} has dtype torch.float32, expected torch.int64"),
    "too large for float32": (put(A, lambda t: t.double() + 1e300), f"{A} holds numbers too large for torch.float32"),
    "config of another rank": (say(r=3), r"has shape \(2, 8\), expected \(3, 8\)|has r=3"),
    "config with a rank of 10^400": (say(r=10**400), "configuration: r ="),
    "rank no number": (say(r="2"), "configuration: r = '2'"),
    "rank missing": (lambda t, c: c.pop("r"), "expected|has r=8"),
    "alpha not finite": (say(lora_alpha=math.nan), "configuration: lora_alpha"),
    "alpha missing its number": (say(lora_alpha={"a": []}), "configuration: lora_alpha"),
    "targets nothing": (say(target_modules=["zzz"]), "does not fit Sequential: no layer"),
    "targets more": (say(target_modules=["q", "v", "0"]), "does not fit|is missing"),
    "targets less": (say(target_modules=["q"]), "not expected|model adapts blocks.0.v and the adapter does not"),
    "targets no strings": (say(target_modules=[["q"]]), "configuration: target_modules"),
    "broken pattern": (say(target_modules="((q"), "configuration: target_modules"),
    "deep pattern": (say(target_modules="(" * 30000 + ")" * 30000), "configuration: target_modules"),
    "rank pattern no number": (say(rank_pattern={"q": 1.5}), "configuration: rank_pattern"),
    "other modules to save": (say(modules_to_save=None), "not expected|the adapter has bias"),
    "other bias": (say(bias="none"), "not expected|the adapter has bias='none'"),
    "unknown bias": (say(bias="most"), "configuration: bias"),
    "another method": (say(peft_type="ADALORA"), "configuration: peft_type"),
    "no method": (lambda t, c: c.pop("peft_type"), "configuration: peft_type"),
    "init beyond the matrix": (say(init_lora_weights="pissa", r=7), "expected|has r=7"),
}


@pytest.mark.parametrize("into", ["fresh", "injected"])
@pytest.mark.parametrize("name", HOSTILE)
def test_what_does_not_fit_is_refused_by_key_and_changes_nothing(toy: Any, folder: Path, name: str, into: str) -> None:
    change, says = HOSTILE[name]
    tensors, config = toy.contents(folder)
    change(tensors, config)
    toy.rewrite(folder, tensors, config)
    model = toy.fresh() if into == "fresh" else toy.trained()
    before, generator = toy.state_of(model), torch.get_rng_state()
    with pytest.raises(AdapterFormatError, match=says) as caught:
        load_adapter(model, folder)
    assert toy.state_of(model) == before
    assert torch.equal(torch.get_rng_state(), generator) or name == "too large for float32"
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("text", ["[]", "null", "3", '"LORA"', "{}", "{", "[" * 99_999, '{"r":' * 5000])
def test_configurations_that_are_none(toy: Any, folder: Path, text: str, inside: bool) -> None:
    toy.rewrite(folder, toy.contents(folder)[0], text, inside)
    model = toy.fresh()
    before = toy.state_of(model)
    with pytest.raises(AdapterFormatError):
        load_adapter(model, folder)
    assert toy.state_of(model) == before


@pytest.mark.parametrize("feature", [{"use_bdlora": {"nblocks": 2}}, {"arrow_config": {"top_k": 3}}])
def test_sound_adapters_of_a_kind_we_lack_are_a_config_error(toy: Any, folder: Path, feature: dict[str, Any]) -> None:
    tensors, config = toy.contents(folder)
    toy.rewrite(folder, tensors, config | feature)
    model = toy.fresh()
    before = toy.state_of(model)
    with pytest.raises(ConfigError, match="does not have"):
        load_adapter(model, folder)
    assert toy.state_of(model) == before


FIELDS: dict[str, Callable[[str], dict[str, Any]]] = {
    "target_modules": lambda pattern: {"target_modules": f".*_proj|{pattern}"},
    "exclude_modules": lambda pattern: {"exclude_modules": pattern},
    "modules_to_save": lambda pattern: {"modules_to_save": [pattern]},
    "rank_pattern": lambda pattern: {"rank_pattern": {pattern: 3}},
    "alpha_pattern": lambda pattern: {"alpha_pattern": {pattern: 3}},
    "layers_pattern": lambda pattern: {"layers_pattern": [pattern, "h"], "layers_to_transform": [0, 1]},
}


@pytest.mark.parametrize("into", ["load_adapter", "pool", "apply_lora"])
@pytest.mark.parametrize("field", FIELDS)
def test_a_pattern_that_keeps_re_busy_for_years_matches_nothing(tmp_path: Path, field: str, into: str) -> None:
    def build() -> nn.Module:
        inner = nn.ModuleDict({"attention_with_a_long_name_of_its_own": nn.ModuleDict({"query_proj": nn.Linear(4, 4)})})
        return nn.Sequential(nn.ModuleDict({"h": nn.ModuleList([inner, copy.deepcopy(inner)])}))

    config: dict[str, Any] = {"target_modules": ["query_proj"], "r": 2, "peft_type": "LORA"}
    expected = plan_injection(build(), LoRAConfig(**config)).adapted
    config |= FIELDS[field](r"(?:\w?\.?){40}!")
    if into == "apply_lora":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert injection(apply_lora(build(), LoRAConfig(**config))) == expected
        return
    keys = [f"base_model.model.{path}.lora_{letter}.weight" for path in expected for letter in "AB"]
    save_file(
        {key: torch.ones((2, 4) if "lora_A" in key else (4, 2)) for key in keys}, tmp_path / "adapter_model.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    if into == "load_adapter":
        assert injection(load_adapter(build(), tmp_path)) == expected
    else:
        pool = AdapterPool(build().eval(), capacity=1, max_rank_total=8)
        pool.load("a", tmp_path)
        assert "a" in pool


def injection(model: nn.Module) -> dict[str, Any]:
    found = injection_of(model)
    assert found is not None
    return found.adapted
