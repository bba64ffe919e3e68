"""What PEFT trains beside A and B of linear layers: read, written, merged and trained on with PEFT as the oracle."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_kernels.adapters import load_adapter, merge_lora, save_adapter, unmerge_lora
from lora_kernels.config import LoRAConfig
from lora_kernels.errors import AdapterFormatError, ConfigError
from lora_kernels.models.inject import apply_lora
from tests.adapters.oracle import assert_same, outputs, randomised

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IDS = torch.arange(36).view(3, 12)


def llama(tied: bool = False, vocabulary: int = 40, dtype: torch.dtype = torch.float32) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes = SIZES | {"num_key_value_heads": 1, "tie_word_embeddings": tied}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, initializer_range=0.3))
    if vocabulary != 40:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model.to(dtype).eval()


def tied() -> nn.Module:
    return llama(tied=True)


def bert() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, num_labels=3, initializer_range=0.3)
    return transformers.BertForSequenceClassification(config).eval()


def t5() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()

    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.t5, self.config = model, model.config

        def get_input_embeddings(self) -> nn.Module:
            return model.get_input_embeddings()

        def get_output_embeddings(self) -> nn.Module:
            return model.get_output_embeddings()

        def forward(self, ids: Tensor) -> Any:
            return model(input_ids=ids, decoder_input_ids=ids)

    return Teacher()


def gemma() -> nn.Module:
    """Its embedding is scaled, by a class of its own, and tied."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=8, initializer_range=0.3)
    return transformers.Gemma3ForCausalLM(config).eval()


BOTH = ["q_proj", "v_proj"]
CASES: list[tuple[Callable[[], nn.Module], dict[str, Any]]] = [
    (llama, {"target_modules": BOTH, "trainable_token_indices": [1, 3, 39]}),
    (llama, {"target_modules": BOTH, "trainable_token_indices": {"embed_tokens": [4, 2], "lm_head": [7]}}),
    (llama, {"target_modules": [*BOTH, "lm_head"], "trainable_token_indices": [1]}),
    (tied, {"target_modules": BOTH, "trainable_token_indices": [5, 3]}),
    (tied, {"target_modules": BOTH, "trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [2]}}),
    (tied, {"target_modules": BOTH, "trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [1, 3]}}),
    (tied, {"target_modules": BOTH, "trainable_token_indices": {"lm_head": [6]}}),
    (tied, {"target_modules": BOTH, "trainable_token_indices": [1], "ensure_weight_tying": True}),
    (bert, {"target_modules": ["query"], "trainable_token_indices": {"word_embeddings": [5]}}),
    (bert, {"target_modules": ["query"], "trainable_token_indices": [5], "task_type": "SEQ_CLS"}),
    (gemma, {"target_modules": BOTH, "trainable_token_indices": [5, 9]}),
    (llama, {"target_modules": BOTH, "modules_to_save": ["embed_tokens"]}),
    (llama, {"target_modules": BOTH, "modules_to_save": ["lm_head"]}),
    (tied, {"target_modules": BOTH, "modules_to_save": ["embed_tokens"]}),
    (tied, {"target_modules": BOTH, "modules_to_save": ["embed_tokens", "lm_head"]}),
    (tied, {"target_modules": BOTH, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    (tied, {"target_modules": BOTH, "modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    (tied, {"target_modules": BOTH, "ensure_weight_tying": True}),
    (llama, {"target_modules": [*BOTH, "lm_head"], "ensure_weight_tying": True}),
    (bert, {"target_modules": ["query", "dense"], "lora_bias": True}),
    (bert, {"target_modules": ["query", "dense"], "lora_bias": True, "bias": "all", "lora_alpha": 20}),
    (bert, {"target_modules": ["value"], "lora_bias": True, "bias": "lora_only", "use_rslora": True}),
    (llama, {"target_modules": BOTH, "lora_bias": True, "rank_pattern": {"v_proj": 4}}),
    (llama, {"target_modules": BOTH, "layer_replication": [[0, 2], [1, 2], [0, 1]]}),
    (bert, {"target_modules": ["query", "dense"], "layer_replication": [[0, 2], [0, 2]], "task_type": "SEQ_CLS"}),
    (bert, {"target_modules": ["query"], "layer_replication": [[1, 2]], "bias": "lora_only"}),
    (llama, {"target_modules": BOTH, "init_lora_weights": "orthogonal", "r": 4}),
    (llama, {"target_modules": BOTH, "init_lora_weights": "mica"}),
    (llama, {"target_modules": BOTH, "fan_in_fan_out": True}),
]


def named(value: Any) -> str:
    """A part of a test's name: of a function its name, which is the same in each process."""
    return getattr(value, "__name__", None) or str(value)[:40]


IDENTITIES = [f"{make.__name__}-{config}" for make, config in CASES]


def theirs_of(make: Callable[[], nn.Module], config: dict[str, Any], folder: Path) -> nn.Module:
    model = peft.get_peft_model(make(), peft.LoraConfig(**({"r": 2, "lora_alpha": 3} | config)))
    randomised(model).save_pretrained(str(folder))
    return model


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("make", "config"), CASES, ids=IDENTITIES)
def test_we_compute_what_peft_computes_and_it_reads_ours_back(make: Any, config: Any, tmp_path: Path) -> None:
    theirs = theirs_of(make, config, tmp_path / "theirs")
    ours = load_adapter(make(), tmp_path / "theirs")
    assert_same(ours, theirs, make(), IDS, what="loaded")
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    save_adapter(ours, tmp_path / "ours")
    assert_same(peft.PeftModel.from_pretrained(make(), str(tmp_path / "ours")).eval(), theirs, make(), IDS, what="back")
    written, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert found.keys() <= written.keys()
    assert_same(load_adapter(make(), tmp_path / "ours"), theirs, make(), IDS, what="again")
    assert_same(load_adapter(ours, tmp_path / "theirs"), theirs, make(), IDS, what="into the same")
    assert_same(copy.deepcopy(ours), theirs, make(), IDS, what="copied")
    assert_same(pickle.loads(pickle.dumps(ours)), theirs, make(), IDS, what="pickled")
    assert_same(merge_lora(ours), theirs, make(), IDS, what="merged")
    before = outputs(load_adapter(make(), tmp_path / "theirs"), IDS)
    assert torch.equal(outputs(unmerge_lora(ours), IDS), before)


@pytest.mark.parametrize(("make", "config"), [c for c in CASES if "mica" not in c[1].values()], ids=named)
def test_what_is_trained_further_is_what_peft_trains(make: Any, config: Any, tmp_path: Path) -> None:
    theirs_of(make, config, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path), is_trainable=True).eval()
    ours = load_adapter(make(), tmp_path, trainable=True)
    gradients = []
    for model in (copy.deepcopy(ours).double(), theirs.double()):
        model(IDS).logits.pow(2).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == len(gradients[1])
    norms = [sorted(float(grad.double().norm()) for grad in one.values()) for one in gradients]
    assert norms[0] == pytest.approx(norms[1], rel=1e-9, abs=1e-12)
    settings = {name: value for name, value in config.items() if name not in ("init_lora_weights", "fan_in_fan_out")}
    again = apply_lora(make(), LoRAConfig(**({"r": 2, "lora_alpha": 3} | settings)))
    assert_same(load_adapter(again, tmp_path), ours, make(), IDS)


@pytest.mark.parametrize("both", [llama, tied])
def test_embeddings_of_a_resized_vocabulary(both: Any, tmp_path: Path) -> None:
    def make() -> nn.Module:
        return llama(tied=both is tied, vocabulary=44)

    theirs = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=BOTH))
    randomised(theirs)
    with torch.no_grad():
        for module in (theirs.get_input_embeddings(), theirs.get_output_embeddings()):
            module.weight += torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(2))
    theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=True)
    ours = load_adapter(make(), tmp_path / "theirs")
    assert_same(ours, theirs, make(), IDS)
    save_adapter(ours, tmp_path / "ours")
    assert_same(peft.PeftModel.from_pretrained(make(), str(tmp_path / "ours")).eval(), theirs, make(), IDS)
    assert_same(merge_lora(ours), theirs, make(), IDS)
    with pytest.raises(AdapterFormatError, match=r"has shape \(44, 16\), expected \(40, 16\)"):
        load_adapter(both(), tmp_path / "theirs")


def test_two_values_for_one_tied_weight_are_refused(tmp_path: Path) -> None:
    theirs_of(
        tied, {"target_modules": BOTH, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, tmp_path
    )
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.lm_head.weight"] + 1
    save_file(tensors, file)
    with pytest.raises(AdapterFormatError, match=r"are one weight of this model, and the file has two"):
        load_adapter(tied(), tmp_path)


ROWS = "trainable_token_indices"
REFUSED: list[tuple[Callable[[], nn.Module], dict[str, Any], str]] = [
    (tied, {"target_modules": [*BOTH, "lm_head"], ROWS: [1]}, f"{ROWS} and by target_modules"),
    (llama, {"target_modules": BOTH, ROWS: {"lm_head": [1]}, "modules_to_save": ["head"]}, "and by modules_to_save"),
    (tied, {"target_modules": [*BOTH, "lm_head"], "ensure_weight_tying": True}, "adapts the embedding that shares"),
    (llama, {"target_modules": BOTH, ROWS: [40]}, "has 40 rows, and row 40 is asked for"),
    (llama, {"target_modules": BOTH, ROWS: {"nothing": [1]}}, "no module .* is called 'nothing'"),
    (llama, {"target_modules": BOTH, ROWS: {"norm": [1]}}, r"rows of nn\.Embedding and nn\.Linear"),
    (bert, {"target_modules": ["query"], ROWS: {"pooler.dense": [1]}}, "has a bias, which PEFT leaves out"),
    (llama, {"target_modules": BOTH, "layer_replication": [[0, 3]]}, "has 2 layers"),
    (t5, {"target_modules": ["q"], "layer_replication": [[0, 1]]}, "has no list of layers at the path of Llama"),
    (
        tied,
        {"target_modules": BOTH, ROWS: {"embed_tokens": [1], "lm_head": [2]}, "ensure_weight_tying": True},
        "share a weight; give both the same rows",
    ),
]


@pytest.mark.parametrize(("make", "config", "says"), REFUSED, ids=named)
def test_what_is_refused_leaves_the_model_as_it_was(make: Any, config: Any, says: str, tmp_path: Path) -> None:
    save_adapter(apply_lora(make(), LoRAConfig(target_modules=config["target_modules"])), tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(json.loads(text) | config))
    model = make()
    kinds = [(path, type(module)) for path, module in model.named_modules()]
    depth, y = model.config.num_hidden_layers, outputs(model, IDS)
    with pytest.raises((AdapterFormatError, ConfigError), match=says):
        load_adapter(model, tmp_path)
    with pytest.raises(ConfigError, match=says):
        apply_lora(model, LoRAConfig(**config))
    assert [(path, type(module)) for path, module in model.named_modules()] == kinds
    assert model.config.num_hidden_layers == depth
    assert torch.equal(outputs(model, IDS), y)
    load_adapter(model, write_plain(make, tmp_path / "plain"))


def write_plain(make: Callable[[], nn.Module], folder: Path) -> Path:
    model = make()
    target = next(path for path, module in model.named_modules() if type(module) is nn.Linear and "lm_head" not in path)
    save_adapter(apply_lora(model, LoRAConfig(target_modules=[target])), folder)
    return folder


def test_a_failure_after_the_injection_undoes_rows_and_replicas(tmp_path: Path) -> None:
    config = {"target_modules": BOTH, "trainable_token_indices": [1, 3], "layer_replication": [[0, 2], [0, 1]]}
    theirs_of(llama, config, tmp_path)
    file, key = tmp_path / "adapter_model.safetensors", "base_model.model.model.embed_tokens.token_adapter."
    tensors = {name: tensor.double() for name, tensor in load_file(file).items()}
    tensors[f"{key}trainable_tokens_delta"][0, 0] = 1e300
    save_file(tensors, file)
    model = llama()
    kinds, y = [(path, type(module)) for path, module in model.named_modules()], outputs(model, IDS)
    with pytest.raises(AdapterFormatError, match=r"numbers too large for torch\.float32"):
        load_adapter(model, tmp_path)
    assert [(path, type(module)) for path, module in model.named_modules()] == kinds
    assert list(model.state_dict()) == list(llama().state_dict())
    assert torch.equal(outputs(model, IDS), y)


def test_mica_is_read_but_not_trained_on(tmp_path: Path) -> None:
    theirs_of(llama, {"target_modules": BOTH, "init_lora_weights": "mica"}, tmp_path)
    with pytest.raises(ConfigError, match="'mica', which trains lora_A only"):
        load_adapter(llama(), tmp_path, trainable=True)
