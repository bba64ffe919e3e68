"""Ranks and alphas of an adapter without a configuration."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.adapters.implied import implied_config, number, settings_of
from lora_kernels.config import LoRAConfig
from lora_kernels.errors import AdapterFormatError
from lora_kernels.models.targets import Matcher

BASE = "base_model.model."


def test_the_usual_numbers_and_patterns_for_the_others() -> None:
    ranks = {"a.q": 2, "b.q": 2, "c.q": 4}
    tensors = {f"{BASE}{path}.lora_A.weight": torch.zeros(r, 8) for path, r in ranks.items()}
    tensors[f"{BASE}d.lora_B.weight"] = torch.zeros(8, 3)
    settings = {"b.q": LoRAConfig(lora_alpha=6, use_rslora=True)}
    config = LoRAConfig.from_peft_dict(implied_config(tensors, {"a.q": 1.0}, settings))
    assert (config.r, config.target_modules) == (2, ["a.q", "b.q", "c.q", "d"])
    assert config.rank_pattern == {"c.q": 4, "d": 3}
    assert {1.0, 6 / 2**0.5 * 2, 4.0, 3.0} == {config.lora_alpha, *config.alpha_pattern.values()}


def test_a_path_that_is_a_pattern_for_others_too_is_written_out() -> None:
    ranks = {"q": 4, "a.q": 2, "b.q": 2}
    tensors = {f"{BASE}{path}.lora_A.weight": torch.zeros(r, 8) for path, r in ranks.items()}
    config = implied_config(tensors, {}, {})
    assert config["rank_pattern"] == {"^q$": 4}
    wild = {"a.q": 4, "b.a_q": 2, "c": 2}
    tensors = {f"{BASE}{path}.lora_A.weight": torch.zeros(r, 8) for path, r in wild.items()}
    assert implied_config(tensors, {}, {})["rank_pattern"] == {r"^a\.q$": 4}


def test_ranks_chosen_layer_by_layer_are_matched_within_the_budget() -> None:
    blocks = [f"down_blocks.{i}.attentions.1.transformer_blocks.{j}.attn1" for i in range(9) for j in range(20)]
    paths = [f"{block}.to_{letter}" for block in blocks for letter in "qkv"]
    tensors = {f"{BASE}{path}.lora_A.weight": torch.zeros(1 + i % 32, 2) for i, path in enumerate(paths)}
    config = LoRAConfig.from_peft_dict(implied_config(tensors, {}, {}))
    matcher = Matcher(config)
    assert [matcher.rank_and_alpha(path)[0] for path in paths] == [1 + i % 32 for i in range(len(paths))]


def test_settings_of_a_component() -> None:
    flat = {"unet.r": 3, "text_encoder.r": 4}
    assert settings_of(flat, ("unet", "transformer")).r == 3
    assert settings_of({"r": 5, "target_modules": None}, ("unet",)).r == 5
    assert settings_of(flat, ("transformer",)) is None


def test_numbers() -> None:
    assert number("a.alpha", torch.tensor([4], dtype=torch.int8)) == 4.0
    with pytest.raises(AdapterFormatError, match=r"'a.alpha' has shape \(2,\)"):
        number("a.alpha", torch.ones(2))
