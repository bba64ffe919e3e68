"""What is filled in where a configuration names no targets: PEFT's choice for every model type it knows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_kernels.config import LoRAConfig
from lora_kernels.errors import ConfigError
from lora_kernels.models.inject import LINEAR
from lora_kernels.models.targets import resolve


def test_default_targets_are_pefts_for_every_model_type_it_knows_and_we_can_build() -> None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as THEIRS
    from transformers import AutoConfig, AutoModel

    small = {
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
        "num_key_value_heads": 2, "num_layers": 2, "d_model": 16, "d_kv": 8, "d_ff": 24, "n_layer": 2, "n_head": 2,
        "n_heads": 2, "n_layers": 2, "n_embd": 16, "n_inner": 24, "n_positions": 16, "encoder_layers": 2,
        "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32,
        "rotary_dim": 4, "embedding_size": 16, "attention_types": [[["global"], 3]], "num_local_experts": 2,
        "attention_hidden_size": 16, "pad_token_id": 0,
    }  # fmt: skip
    not_in_this_release = {"btlm", "chatglm", "rwkv7", "RefinedWeb", "RefinedWebModel"}
    for kind in THEIRS.keys() - not_in_this_release:
        with torch.device("meta"):
            model = AutoModel.from_config(AutoConfig.for_model(kind, **small))
        found, names = resolve(model, LoRAConfig(), LINEAR).target_modules, THEIRS[kind]
        assert isinstance(found, str) == isinstance(names, str), kind
        assert sorted(found or ()) == sorted(names), kind


def test_unknown_model_is_told_to_pass_target_modules() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(ConfigError, match=r"Sequential.*target_modules=.*of which this model has 0, 1"):
        resolve(model, LoRAConfig(), LINEAR)
    with pytest.raises(ConfigError, match="no linear layer"):
        resolve(nn.Sequential(nn.ReLU()), LoRAConfig(target_modules="all-linear"), LINEAR)


@pytest.mark.parametrize("task_type", ["TOKEN_CLS", "SEQ_CLS", "QUESTION_ANS", "CAUSAL_LM", None])
def test_heads_are_added_to_modules_to_save_as_peft_adds_them(task_type: str | None) -> None:
    import peft

    model = nn.ModuleDict({"q": nn.Linear(2, 2), "v": nn.Linear(2, 2), "score": nn.Linear(2, 2)})
    model.config = {"model_type": "custom"}  # type: ignore[assignment]
    model.prepare_inputs_for_generation = None  # type: ignore[assignment]
    theirs = peft.LoraConfig(task_type=task_type, target_modules=["q", "v"])
    peft.get_peft_model(copy.deepcopy(model), theirs)
    ours = resolve(model, LoRAConfig(task_type=task_type), LINEAR)
    assert ours.modules_to_save == theirs.modules_to_save
    assert resolve(model, ours, LINEAR).modules_to_save == ours.modules_to_save
