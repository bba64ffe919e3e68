"""transformers' generate() over a pool, against PEFT running each request alone: greedy, sampling, beams, prompts of
several lengths, three adapters of different ranks that PEFT has written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import lora_kernels as lk

VOCABULARY = 97
TARGETS: dict[str, list[list[str] | str]] = {
    "llama": ["all-linear", ["q_proj", "v_proj"], ["gate_proj", "down_proj", "o_proj"]],
    "gpt2": ["all-linear", ["c_attn"], ["c_fc", "c_proj"]],
    "t5": ["all-linear", ["q", "v"], ["wi", "wo", "o"]],
}
RANKS = (4, 8, 3)
NAMES = ["0", None, "2", "1", "0", "2"]


def make(kind: str) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "llama":
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
        config = LlamaConfig(hidden_size=48, intermediate_size=64, initializer_range=0.2, **heads, **sizes)
        return LlamaForCausalLM(config).eval()
    if kind == "t5":
        config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, initializer_factor=4.0, **sizes)
        config.decoder_start_token_id = 0
        return T5ForConditionalGeneration(config).eval()
    return GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=2, n_head=4, initializer_range=0.2, **sizes)).eval()


@pytest.fixture(scope="module", params=["llama", "gpt2", "t5"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(the pool's model, the pool, PEFT's model)"""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    for number, (r, targets) in enumerate(zip(RANKS, TARGETS[kind], strict=True)):
        torch.manual_seed(number + 1)
        config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, init_lora_weights=False)
        peft.get_peft_model(make(kind), config).save_pretrained(folder / str(number))
    model, base = make(kind), make(kind)
    pool = lk.AdapterPool(model, capacity=3, max_rank_total=sum(RANKS))
    reference = peft.PeftModel.from_pretrained(base, folder / "0", "0")
    for number in range(3):
        pool.load(str(number), folder / str(number))
        if number:
            reference.load_adapter(folder / str(number), str(number))
    return model, pool, reference


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Six of 3 to 8 tokens, padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(5)
    ids, mask = torch.zeros(6, 8, dtype=torch.int64), torch.zeros(6, 8, dtype=torch.int64)
    for row in range(6):
        ids[row, row:] = torch.randint(3, VOCABULARY, (8 - row,), generator=generator)
        mask[row, row:] = 1
    return ids, mask


def generate(model: Any, rows: slice, **options: Any) -> torch.Tensor:
    ids, mask = prompts()
    return model.generate(input_ids=ids[rows], attention_mask=mask[rows], max_new_tokens=8, **options)


def alone(reference: Any, row: int, name: str | None, **options: Any) -> torch.Tensor:
    if name is None:
        with reference.disable_adapter():
            return generate(reference, slice(row, row + 1), **options)
    reference.set_adapter(name)
    return generate(reference, slice(row, row + 1), **options)


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """But for what pads the shorter rows of a batch at the end: the pad token or the end of the text."""
    return [trimmed(row) for row in got.tolist()] == [trimmed(row) for row in wanted.tolist()]


def trimmed(row: list[int]) -> list[int]:
    while row and row[-1] in (0, 2):
        row = row[:-1]
    return row


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    ],
    ids=["greedy", "beams"],
)
def test_a_mixed_batch_is_each_request_alone(served: Any, options: dict[str, Any]) -> None:
    model, pool, reference = served
    with pool.batch(NAMES):
        got = generate(model, slice(0, 6), **options)
    answers = options.get("num_return_sequences", 1)
    rows = [alone(reference, row, name, **options) for row, name in enumerate(NAMES)]
    for row, wanted in enumerate(rows):
        assert same(got[row * answers : (row + 1) * answers], wanted), row
    with pool.batch([None] * 6):
        assert not same(generate(model, slice(0, 6), **options), got)
    with pool.batch(NAMES[1:] + NAMES[:1]):
        assert not same(generate(model, slice(0, 6), **options), got)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_request_with_a_scale_of_its_own(served: Any, beams: int) -> None:
    model, pool, reference = served
    options = {"do_sample": False, "num_beams": beams}
    with pool.batch([("0", 0.5), None, ("2", -1.0), "1", ("0", 2), "2"]):
        got = generate(model, slice(0, 6), **options)
    for row, (name, scale) in enumerate([("0", 0.5), (None, 1), ("2", -1.0), ("1", 1), ("0", 2), ("2", 1)]):
        layers = [layer for layer in reference.modules() if isinstance(layer, LoraLayer) and name in layer.scaling]
        for layer in layers:
            layer.scaling[name] *= scale
        wanted = alone(reference, row, name, **options)
        for layer in layers:
            layer.scaling[name] /= scale
        assert same(got[row : row + 1], wanted), row


def test_sampling_with_one_seed(served: Any) -> None:
    model, pool, reference = served
    for row, name in enumerate(NAMES[:3]):
        torch.manual_seed(7)
        wanted = alone(reference, row, name, do_sample=True, num_return_sequences=3)
        torch.manual_seed(7)
        with pool.batch([name]):
            assert same(generate(model, slice(row, row + 1), do_sample=True, num_return_sequences=3), wanted)


def test_a_batch_of_ids_in_a_static_tensor(served: Any) -> None:
    model, pool, reference = served
    static = torch.full((3,), -1, dtype=torch.int32)
    for names in (NAMES[:3], NAMES[3:]):
        with pool.batch(static):
            pool.ids(names, out=static)
            got = generate(model, slice(0, 3), do_sample=False)
        for row, name in enumerate(names):
            assert same(got[row : row + 1], alone(reference, row, name, do_sample=False)), row


def test_an_adapter_of_the_output_head_is_served_where_the_pool_holds_it(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    reference = peft.get_peft_model(make("llama"), config)
    reference.save_pretrained(tmp_path)  # writes the head's base weight beside A and B
    with pytest.raises(lk.UnservableAdapterError, match=r"lm_head \(the output head"):
        lk.AdapterPool(make("llama"), capacity=1, max_rank_total=4).load("a", tmp_path)
    model = make("llama")
    pool = lk.AdapterPool(model, capacity=1, max_rank_total=4, target_modules=["lm_head", "q_proj"])
    pool.load("a", tmp_path)
    ids = prompts()[0]
    with torch.no_grad(), pool.batch(["a"]):
        assert torch.allclose(model(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_classifier_with_a_pooler(tmp_path: Path) -> None:
    """Matrices (n, K) and tensors (n, T, K) in one model."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, initializer_range=0.2, **sizes)).eval()
    references = []
    for number, targets in enumerate((["query", "pooler.dense"], "all-linear")):
        config = peft.LoraConfig(r=3 + number, target_modules=targets, init_lora_weights=False)
        references.append(peft.get_peft_model(copy.deepcopy(base), config).eval())
        references[-1].save_pretrained(tmp_path / str(number))
    pool = lk.AdapterPool(base, capacity=2, max_rank_total=8)
    for number in range(2):
        pool.load(str(number), tmp_path / str(number))
    ids, mask = prompts()
    with torch.no_grad(), pool.batch(["1", "0", None, "0", "1", "1"]):
        got = base(ids, attention_mask=mask).logits
        for row, number in ((0, 1), (1, 0), (3, 0), (4, 1), (5, 1)):
            wanted = references[number](ids[row : row + 1], attention_mask=mask[row : row + 1]).logits
            assert torch.allclose(got[row], wanted[0], rtol=1e-4, atol=1e-4)
