"""Ranks and alphas of an adapter without a configuration."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.adapters.implied import implied_config, number, settings_of
from lora_kernels.config import LoRAConfig
from lora_kernels.errors import AdapterFormatError

BASE = "base_model.model."


def test_the_usual_numbers_and_patterns_for_the_others() -> None:
    ranks = {"a.q": 2, "b.q": 2, "c.q": 4}
    tensors = {f"{BASE}{path}.lora_A.weight": torch.zeros(r, 8) for path, r in ranks.items()}
    tensors[f"{BASE}d.lora_B.weight"] = torch.zeros(8, 3)
    settings = {"b.q": LoRAConfig(lora_alpha=6, use_rslora=True)}
    config = LoRAConfig.from_peft_dict(implied_config(tensors, {"a.q": 1.0}, settings))
    assert (config.r, config.target_modules) == (2, ["a.q", "b.q", "c.q", "d"])
    assert config.rank_pattern == {r"^c\.q$": 4, "^d$": 3}
    assert {1.0, 6 / 2**0.5 * 2, 4.0, 3.0} == {config.lora_alpha, *config.alpha_pattern.values()}


def test_settings_of_a_component() -> None:
    flat = {"unet.r": 3, "text_encoder.r": 4}
    assert settings_of(flat, ("unet", "transformer")).r == 3
    assert settings_of({"r": 5, "target_modules": None}, ("unet",)).r == 5
    assert settings_of(flat, ("transformer",)) is None


def test_numbers() -> None:
    assert number("a.alpha", torch.tensor([4], dtype=torch.int8)) == 4.0
    with pytest.raises(AdapterFormatError, match=r"'a.alpha' has shape \(2,\)"):
        number("a.alpha", torch.ones(2))
