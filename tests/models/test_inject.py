"""apply_lora: what is replaced, what is trainable, what is tied, and that the function starts as it was."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lora_kernels.config import LoRAConfig
from lora_kernels.layers import LoRALinear
from lora_kernels.models.explain import injection_of
from lora_kernels.models.inject import apply_lora

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IDS = torch.arange(12).view(2, 6)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES)).eval()


def llama(tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=tied)).eval()


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


def in_pefts_words(names: set[str], adapted: set[str], saved: list[str]) -> set[str]:
    """Our parameter names as PEFT spells them."""
    spelled = set()
    for name in names:
        owner, _, last = name.rpartition(".")
        inside = next((path for path in saved if name.startswith(f"{path}.")), None)
        if inside:
            name = name.replace(f"{inside}.", f"{inside}.modules_to_save.default.", 1)
        elif owner in adapted:
            name = f"{owner}.base_layer.bias" if last == "bias" else f"{owner}.{last}.default.weight"
        spelled.add(f"base_model.model.{name}")
    return spelled


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("more", [{}, {"inference_mode": True}, {"modules_to_save": ["classifier", "lm_head", "norm"]}])
def test_what_is_trainable_is_what_peft_trains(make: Any, bias: str, more: dict[str, Any]) -> None:
    import peft

    settings = {"target_modules": "all-linear", "bias": bias, **more}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(make(), peft.LoraConfig(**settings))
        ours = apply_lora(make(), LoRAConfig(**settings))
    injection = injection_of(ours)
    assert injection is not None
    expected = trainable(theirs)
    if more.get("inference_mode"):
        expected = set()  # PEFT leaves the biases trainable in a frozen adapter, which is hardly meant
    assert in_pefts_words(trainable(ours), set(injection.adapted), list(injection.saved)) == expected


def test_layers_share_their_parameters_and_start_as_the_base() -> None:
    model = bert()
    before, expected = dict(model.named_parameters()), model(IDS).logits
    assert apply_lora(model, LoRAConfig(target_modules="all-linear")) is model
    for name, parameter in before.items():
        assert model.get_parameter(name) is parameter
    layer = model.get_submodule("classifier")
    assert isinstance(layer, LoRALinear)
    assert torch.equal(model(IDS).logits, expected)
    layer.lora_B.data.fill_(0.5)
    assert (model(IDS).logits - expected).abs().max() > 1e-3


def test_a_model_in_eval_mode_stays_in_eval_mode() -> None:
    model = apply_lora(bert(), LoRAConfig(lora_dropout=0.9, init_lora_weights=False))
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    assert all(module.training for module in apply_lora(bert().train(), LoRAConfig()).modules())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_config_and_report_survive_copies(how: str) -> None:
    model = apply_lora(bert(), LoRAConfig(r=3, target_modules="all-linear", task_type="SEQ_CLS"))
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, buffer := io.BytesIO())
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert injection_of(other) == injection_of(model)
    assert other.get_parameter("classifier.weight") is not model.get_parameter("classifier.weight")
    assert trainable(other) == trainable(model)
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_pissa_moves_weight_into_the_adapter_and_keeps_the_function() -> None:
    model = bert()
    expected, before = model(IDS).logits, model.get_parameter("bert.pooler.dense.weight").detach().clone()
    apply_lora(model, LoRAConfig(r=4, target_modules=["dense", "query"], init_lora_weights="pissa"))
    assert (model.get_parameter("bert.pooler.dense.weight") - before).abs().max() > 1e-3
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-5)


def test_tied_target_warns_and_leaves_the_embedding_alone() -> None:
    model = llama(tied=True)
    embedding = model.get_submodule("model.embed_tokens").weight
    with pytest.warns(UserWarning, match="lm_head.weight is tied to model.embed_tokens.weight"):
        apply_lora(model, LoRAConfig(target_modules=["lm_head"]))
    assert model.get_submodule("lm_head").weight is embedding
    assert model.get_submodule("model.embed_tokens").weight is embedding


def test_tied_module_to_save_gets_weights_of_its_own() -> None:
    model = llama(tied=True)
    expected = model(IDS).logits
    with pytest.warns(UserWarning, match="lm_head.weight is no longer tied to model.embed_tokens.weight"):
        apply_lora(model, LoRAConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    head, embedding = model.get_parameter("lm_head.weight"), model.get_parameter("model.embed_tokens.weight")
    assert head is not embedding
    assert (head.requires_grad, embedding.requires_grad) == (True, False)
    assert torch.equal(model(IDS).logits, expected)


@pytest.mark.filterwarnings("ignore:exclude_modules", "ignore:rank_pattern")
def test_slips_of_the_pen_warn() -> None:
    config = LoRAConfig(target_modules=["query", "valeu"], rank_pattern={"k": 2}, exclude_modules=["zzz"])
    with pytest.warns(UserWarning, match="no module is called") as caught:
        apply_lora(bert(), config)
    said = " ".join(str(warning.message) for warning in caught)
    assert "rank_pattern: 'k'" in said
    assert "['zzz'] excludes nothing" in said


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("mask", [True, False])
def test_torchs_encoder_does_not_skip_adapters_in_inference(grad: bool, mask: bool) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2).eval()
    apply_lora(model, LoRAConfig(target_modules="all-linear", init_lora_weights=False))
    x, padding = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.set_grad_enabled(grad):
        found = model(x, src_key_padding_mask=padding if mask else None)
        for layer in model.modules():
            if isinstance(layer, LoRALinear):
                layer.merge()
        torch.testing.assert_close(model(x, src_key_padding_mask=padding if mask else None), found)
        for layer in model.modules():
            if isinstance(layer, LoRALinear):
                layer.unmerge()
                layer.lora_B.data.zero_()
        assert (model(x, src_key_padding_mask=padding if mask else None) - found).abs().max() > 1e-2


def test_sixteen_bit_model_has_float32_adapters_as_in_peft() -> None:
    model = apply_lora(bert().to(torch.bfloat16), LoRAConfig())
    layer = model.get_submodule("bert.encoder.layer.0.attention.self.query")
    assert (layer.weight.dtype, layer.lora_A.dtype, layer.lora_B.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
    assert torch.isfinite(model(IDS).logits).all()
