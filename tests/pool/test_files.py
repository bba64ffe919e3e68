"""What a pool reads of an adapter, and what it refuses, each with its class and a message."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lora_kernels.adapters import replicate_layers, save_adapter
from lora_kernels.config import LoRAConfig
from lora_kernels.errors import AdapterFormatError, UnservableAdapterError
from lora_kernels.models.inject import apply_lora
from lora_kernels.pool import AdapterPool
from lora_kernels.pool.files import Update, check_ranks, convert_updates, read_updates
from lora_kernels.testing.rule import assert_close

KEY = "base_model.model.blocks.0.q.lora_{}.weight"


@pytest.fixture
def model(served: Any) -> nn.Module:
    return served().eval()


def read(model: nn.Module, adapter: Any, config: Any = None, targets: list[str] | None = None) -> dict[str, Update]:
    """As a pool over these layers reads it; the model is as it was."""
    pool = AdapterPool(model, capacity=1, max_rank_total=8, target_modules=targets)
    try:
        return read_updates(model, pool._pooled.layers, pool.left_out, adapter, config)
    finally:
        pool.close()


def test_a_folder_of_ours(model: nn.Module, served: Any, tmp_path: Path) -> None:
    trained = apply_lora(
        served(), LoRAConfig(r=2, lora_alpha=6, target_modules=["q", "v"], rank_pattern={"blocks.1.v": 3})
    )
    for parameter in trained.parameters():
        nn.init.normal_(parameter)
    save_adapter(trained, tmp_path)
    updates = read(model, tmp_path)
    assert list(updates) == ["blocks.0.q", "blocks.0.v", "blocks.1.q", "blocks.1.v"]
    assert [(one.rank, one.scaling) for one in updates.values()] == [(2, 3.0)] * 3 + [(3, 2.0)]
    for path, one in updates.items():
        assert torch.equal(one.A, trained.get_parameter(f"{path}.lora_A"))
        assert torch.equal(one.B, trained.get_parameter(f"{path}.lora_B"))


@pytest.mark.parametrize("how", ["LoRAConfig", "peft", "dictionary"])
def test_tensors_in_memory(model: nn.Module, served: Any, how: str) -> None:
    config: Any = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q"])
    trained = peft.get_peft_model(served(), config)
    tensors = peft.get_peft_model_state_dict(trained)
    if how != "peft":
        config = LoRAConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q"])
    updates = read(model, tensors, config.to_peft_dict() if how == "dictionary" else config)
    assert list(updates) == ["blocks.0.q", "blocks.1.q"]
    assert all((one.rank, one.scaling) == (4, 6 / math.sqrt(4)) for one in updates.values())


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "orthogonal", "r": 4},
        {"init_lora_weights": "mica", "ensure_weight_tying": True},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"fan_in_fan_out": True},
        {"init_lora_weights": False},
        {"lora_dropout": 0.5},
    ],
)
def test_what_does_not_matter_to_a_trained_adapter(model: nn.Module, adapter: Any, options: dict[str, Any]) -> None:
    one = adapter(0, 4)
    assert len(read(model, one.tensors, one.config.to_peft_dict() | options)) == 4


def replaced(**values: Any) -> Any:
    return lambda one: (one.tensors, one.config.to_peft_dict() | values)


def with_tensors(**tensors: torch.Tensor | None) -> Any:
    """Keys with two underscores for dots; None takes one away."""

    def change(one: Any) -> Any:
        changed = dict(one.tensors)
        for key, tensor in tensors.items():
            name = f"base_model.model.{key.replace('__', '.')}"
            if tensor is None:
                del changed[name]
            else:
                changed[name] = tensor
        return changed, one.config.to_peft_dict()

    return change


ONE = torch.ones(1)
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "shape-of-A": (with_tensors(blocks__0__q__lora_A__weight=torch.zeros(3, 7)), AdapterFormatError,
                   r"blocks.0.q.lora_A.weight has shape \(3, 7\), expected \(3, 8\)"),
    "A-transposed": (with_tensors(blocks__0__q__lora_A__weight=torch.zeros(8, 3)), AdapterFormatError,
                     r"shape \(8, 3\), expected \(3, 8\)"),
    "rank-of-B": (with_tensors(blocks__0__q__lora_B__weight=torch.zeros(6, 2)), AdapterFormatError,
                  r"shape \(6, 2\), expected \(6, 3\)"),
    "integers": (with_tensors(blocks__0__q__lora_A__weight=torch.zeros(3, 8, dtype=torch.int8)), AdapterFormatError,
                 "dtype torch.int8, expected a float"),
    "nan": (with_tensors(blocks__0__q__lora_A__weight=torch.full((3, 8), math.nan)), AdapterFormatError, "NaN or inf"),
    "meta": (with_tensors(blocks__0__q__lora_A__weight=torch.zeros(3, 8, device="meta")), AdapterFormatError,
             "no plain tensor in memory"),
    "sparse": (with_tensors(blocks__0__q__lora_A__weight=torch.zeros(3, 8).to_sparse()), AdapterFormatError,
               "no plain tensor in memory"),
    "missing": (with_tensors(blocks__0__q__lora_A__weight=None), AdapterFormatError,
                r"lora_A.weight' is missing \(8 keys expected, 1 missing, 0 too many\)"),
    "too-many": (with_tensors(blocks__0__x=ONE), AdapterFormatError, "in the file but not expected"),
    "magnitudes": (with_tensors(blocks__0__q__lora_magnitude_vector=ONE), UnservableAdapterError, "magnitudes of DoRA"),
    "embedding": (with_tensors(e__lora_embedding_A=ONE), UnservableAdapterError, "a trained embedding"),
    "tokens": (with_tensors(e__trainable_tokens_delta=ONE), UnservableAdapterError, "trained tokens"),
    "not-tensors": (lambda one: ({3: ONE}, one.config), AdapterFormatError, "a mapping from PEFT's keys to tensors"),
    "no-config": (lambda one: (one.tensors, None), AdapterFormatError, "need the configuration they belong to"),
    "a-list": (lambda one: (one.tensors, [1]), AdapterFormatError, "need the configuration they belong to"),
    "dora": (replaced(use_dora=True), UnservableAdapterError, "use_dora: a magnitude that scales"),
    "pissa": (replaced(init_lora_weights="pissa"), UnservableAdapterError, "has changed the base weights"),
    "lora-bias": (replaced(lora_bias=True), UnservableAdapterError, "lora_bias=True.*load_adapter"),
    "lora-bias-alone": (with_tensors(blocks__0__q__lora_B__bias=ONE), UnservableAdapterError, "has a bias on lora_B"),
    "rows": (replaced(trainable_token_indices=[1]), UnservableAdapterError, "has trainable_token_indices"),
    "replicas": (replaced(layer_replication=[[0, 1]]), UnservableAdapterError, "replicate_layers.model, layer_repl"),
    "corda": (replaced(init_lora_weights="corda"), UnservableAdapterError, "path_initial_model_for_weight_conversion"),
    "arrow": (replaced(arrow_config={"top_k": 3}), UnservableAdapterError, "a pool does not serve this adapter: arrow"),
    "bad-rank": (replaced(r=0), AdapterFormatError, "r = 0"),
    "other-type": (replaced(peft_type="IA3"), AdapterFormatError, "peft_type = 'IA3'"),
    "another-model": (replaced(target_modules=["c_attn"]), AdapterFormatError, "no module matches target_mod"),
    "saved": (lambda one: ({**one.tensors, "base_model.model.head.weight": ONE},
                           one.config.to_peft_dict() | {"modules_to_save": ["head"]}),
              UnservableAdapterError, "a module trained whole"),
    "biases": (lambda one: ({**one.tensors, "base_model.model.blocks.0.q.base_layer.bias": ONE},
                            one.config.to_peft_dict() | {"bias": "lora_only"}),
               UnservableAdapterError, r"trained biases \(bias='lora_only'\)"),
    "config-and-folder": (lambda one: ("somewhere", one.config), AdapterFormatError, "a folder has its own"),
    "no-folder": (lambda one: ("somewhere", None), AdapterFormatError, "somewhere"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(model: nn.Module, adapter: Any, case: str) -> None:
    change, error, message = REFUSED[case]
    with pytest.raises(error, match=message) as raised:
        read(model, *change(adapter(0, 3)))
    assert type(raised.value) is error


def test_modules_that_are_not_pooled_are_named_with_the_reason(model: nn.Module, adapter: Any) -> None:
    one = adapter(0, 3)
    with pytest.raises(
        UnservableAdapterError,
        match=r"targets 2 of its 4 modules that this pool does not hold: blocks.0.v \(not in the pool's target_mod",
    ):
        read(model, one.tensors, one.config, targets=["q"])
    config = one.config.to_peft_dict() | {"target_modules": ["blocks.0", "q"]}
    with pytest.raises(UnservableAdapterError, match=r"blocks.0 \(a Block, no linear layer\)"):
        read(model, one.tensors, config)


def test_conversion(model: nn.Module, adapter: Any) -> None:
    one = adapter(0, 3)
    one.tensors[KEY.format("B")].requires_grad_()
    updates = read(model, one.tensors, one.config)
    pool = AdapterPool(model.half(), capacity=1, max_rank_total=8)
    updates = convert_updates(updates, pool._pooled.layers)
    assert {tensor.dtype for update in updates.values() for tensor in update[:2]} == {torch.float32}
    assert not any(update.B.requires_grad for update in updates.values())
    large = {"blocks.0.q": updates["blocks.0.q"]._replace(B=torch.full((6, 3), 70000.0))}
    assert torch.equal(convert_updates(large, pool._pooled.layers)["blocks.0.q"].B, large["blocks.0.q"].B)
    large = {"blocks.0.q": updates["blocks.0.q"]._replace(B=torch.full((6, 3), 1e39, dtype=torch.float64))}
    with pytest.raises(AdapterFormatError, match=r"blocks\.0\.q\.lora_B holds numbers too large for torch\.float32"):
        convert_updates(large, pool._pooled.layers)


def test_ranks() -> None:
    updates = {f"l{r}": Update(torch.zeros(r, 2), torch.zeros(2, r), 1.0) for r in (2, 5, 3)}
    check_ranks("a", updates, 5)
    with pytest.raises(UnservableAdapterError, match="'a' has rank 5 in l5, and this pool takes up to max_rank=4"):
        check_ranks("a", updates, 4)


def test_a_head_that_is_the_models_own_is_served_and_another_is_refused_by_name(served: Any) -> None:
    model = served().eval()
    model.add_module("head", nn.Linear(8, 3))
    trained = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q"], modules_to_save=["head"]))
    tensors, config = peft.get_peft_model_state_dict(trained), trained.peft_config["default"]
    assert len(read(model, tensors, config, targets=["q"])) == 2
    tensors["base_model.model.head.weight"] = tensors["base_model.model.head.weight"] + 1
    with pytest.raises(
        UnservableAdapterError, match=r"modules_to_save\) that differs from the model's, .*Load it with load_adapter"
    ):
        read(model, tensors, config, targets=["q"])


def test_replicated_layers_are_served_where_the_model_has_them() -> None:
    transformers = pytest.importorskip("transformers")

    def llama() -> nn.Module:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=40)).eval()

    runs, ids = [[0, 2], [1, 2]], torch.arange(36).view(3, 12)
    settings = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, "layer_replication": runs}
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**settings)).eval()
    model = replicate_layers(llama(), runs)
    pool = AdapterPool(model, capacity=1, max_rank_total=4)
    pool.load("a", peft.get_peft_model_state_dict(theirs), theirs.peft_config["default"])
    with torch.no_grad(), pool.batch(["a"] * 3):
        served = model(ids).logits
    with torch.no_grad():
        plain, truth = theirs(ids).logits, theirs.double()(ids).logits
    assert_close(served, plain, truth)
