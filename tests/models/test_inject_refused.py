"""What apply_lora refuses, and that a refusal leaves the model as it was, bit for bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_kernels.config import LoRAConfig
from lora_kernels.errors import ConfigError
from lora_kernels.layers import LoRALinear
from lora_kernels.models.inject import apply_lora, rollback

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES)).eval()


def llama(tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=tied)).eval()


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything a refusal must leave alone: modules and Parameters by identity, bits, flags, modes, attributes."""
    return {
        "modules": [(path, id(m), m.training, sorted(vars(m))) for path, m in model.named_modules()],
        "parameters": [
            (name, id(p), p.data_ptr(), p.requires_grad, p.detach().clone().contiguous().view(torch.uint8).tolist())
            for name, p in model.named_parameters(remove_duplicate=False)
            if not nn.parameter.is_lazy(p)
        ],
    }


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda *_: None)
    return model


def patched() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].forward = lambda x: x  # type: ignore[method-assign]
    return model


def quantised() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return model


class Shard(Tensor):
    """Stands for DTensor and for torchao's quantised tensors: a weight that is not what it seems."""


def sharded() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4).as_subclass(Shard))
    return model


def conv1d() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2))


def mamba() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=4))


def encoder_layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True))


def parametrised() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))


def listed() -> nn.Module:
    return nn.ModuleDict({"heads": nn.ModuleList([nn.Linear(4, 4)]), "q": nn.Linear(4, 4)})


def with_nan() -> nn.Module:
    model = bert()
    with torch.no_grad():
        model.get_parameter("bert.encoder.layer.1.attention.self.query.weight")[3, 5] = math.nan
    return model


@pytest.mark.parametrize(
    ("make", "config", "says"),
    [
        (bert, {"target_modules": ["nothing"]}, "no layer.*classifier, dense, key, query, value"),
        (bert, {"target_modules": ["query"], "exclude_modules": r".*"}, "no layer"),
        (bert, {"target_modules": ["query"], "layers_to_transform": 9}, "no layer.*layers_to_transform=9"),
        (bert, {"target_modules": ["classifier"], "task_type": "SEQ_CLS"}, "no layer.*modules_to_save="),
        (bert, {"target_modules": ["word_embeddings"]}, "word_embeddings, which is a Embedding; only nn.Linear"),
        (bert, {"target_modules": r".*LayerNorm"}, "LayerNorm; only nn.Linear"),
        (bert, {"target_modules": ["query"], "modules_to_save": ["ncoder"]}, "ncoder.* holds the target"),
        (listed, {"target_modules": ["q"], "modules_to_save": ["heads"]}, "heads, a ModuleList"),
        (lambda: nn.Sequential(OwnForward(4, 4)), {"target_modules": ["0"]}, "0, which is a OwnForward"),
        (lambda: nn.Sequential(OwnForward(4, 4)), {"target_modules": "all-linear"}, "OwnForward"),
        (parametrised, {"target_modules": ["0"]}, "parametrised"),
        (hooked, {"target_modules": ["0"]}, "hooks"),
        (patched, {"target_modules": ["0"]}, "patched forward"),
        (quantised, {"target_modules": ["0"]}, "quantised"),
        (sharded, {"target_modules": ["0"]}, "parametrised or sharded"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)), {"target_modules": ["0"]}, "lazy parameters"),
        (
            lambda: nn.Sequential(nn.Linear(4, 4).to(torch.float8_e4m3fn)),
            {"target_modules": ["0"]},
            "no plain floating",
        ),
        (conv1d, {}, "Conv1D; only nn.Linear"),
        (conv1d, {"target_modules": "all-linear"}, "Conv1D; only nn.Linear"),
        (mamba, {"target_modules": ["out_proj"]}, "would never be called: Mamba"),
        (encoder_layer, {"target_modules": ["out_proj"]}, "would never be called: nn.MultiheadAttention"),
        (encoder_layer, {}, "target_modules is None"),
        (lambda: nn.Sequential(nn.ReLU()), {"target_modules": ["0"]}, "0, which is a ReLU"),
        (lambda: nn.Linear(4, 4), {"target_modules": "all-linear"}, "no linear layer"),
        (bert, {"r": 17, "init_lora_weights": "pissa"}, "layer.0.attention.self.query: init_lora_weights='pissa'"),
        (with_nan, {"r": 2, "init_lora_weights": "pissa"}, "layer.1.attention.self.query: init_lora_weights"),
        (with_nan, {"r": 2, "init_lora_weights": "olora", "modules_to_save": ["classifier"]}, "finite W"),
        (lambda: llama(tied=True), {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": "pissa"}, "tied to"),
    ],
)
def test_refusals_leave_the_model_bit_for_bit_as_it_was(make: Any, config: dict[str, Any], says: str) -> None:
    model = make()
    before = state_of(model)
    with pytest.raises(ConfigError, match=says):
        apply_lora(model, LoRAConfig(**config))
    assert state_of(model) == before


def test_twice_and_inside_wrappers_is_refused() -> None:
    model = apply_lora(bert(), LoRAConfig())
    before = state_of(model)
    with pytest.raises(ConfigError, match="already"):
        apply_lora(model, LoRAConfig(target_modules=["key"]))
    assert state_of(model) == before
    with pytest.raises(ConfigError, match="already"):
        apply_lora(nn.Sequential(LoRALinear(4, 4), nn.Linear(4, 4)), LoRAConfig(target_modules=["1"]))
    with pytest.raises(ConfigError, match=r"before torch\.compile"):
        apply_lora(torch.compile(bert()), LoRAConfig())


@pytest.mark.parametrize("when", ["modules", "parameters", "flags", "weights", "remembered"])
def test_rollback_undoes_every_kind_of_change(when: str) -> None:
    model = bert()
    before = state_of(model)

    def change() -> None:
        if when == "modules":
            model.classifier = nn.Linear(2, 2)
        elif when == "parameters":
            model.get_submodule("classifier").weight = nn.Parameter(torch.zeros(2, 16))
        elif when == "flags":
            model.requires_grad_(False)
        elif when == "weights":
            model.get_parameter("classifier.weight").data = torch.zeros(2, 16)
        else:
            apply_lora(model, LoRAConfig())
        assert state_of(model) != before
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), rollback(model):
        change()
    assert state_of(model) == before
