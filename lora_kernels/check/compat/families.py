"""Builds tiny models of commonly adapted families from configurations: random weights, nothing downloaded.

The models have two layers, 32 to 64 wide; a forward and backward takes milliseconds. Every source of randomness of the
base (dropout, drop path) is off, and the weights are large enough that each layer changes the output. So differences
between two runs come from LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Inputs = dict[str, Tensor]

VOCABULARY, ROWS, TOKENS = 64, 3, 12
PAD, START = 0, 1
SPREAD = 0.15  # standard deviation of the weights: a layer 32 to 64 wide keeps the norm of its input


@dataclass(frozen=True)
class Family:
    """Describe a family of models.

    name: its usual name. task: PEFT's task_type ("" if PEFT has none). attention, linear: usual target_modules of PEFT,
    the attention's projections or every linear layer except the head. decodes: has ``generate``.
    config, model_class: names in transformers. settings: the configuration's own fields.
    """

    name: str
    task: str
    config: str
    model_class: str
    attention: tuple[str, ...]
    linear: tuple[str, ...]
    draw: Callable[[torch.Generator], Inputs]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def decodes(self) -> bool:
        return self.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM")

    def build(self, seed: int = 0, **settings: Any) -> tuple[Any, Inputs]:
        """Return a new model in training mode, equal weights for equal seeds, and inputs with labels (for ``.loss``).

        Args:
            settings: fields of the configuration that replace this family's.
        """
        return self.model(seed, **settings), self.example_inputs(seed)

    def model(self, seed: int = 0, **settings: Any) -> Any:
        """Return the model alone. The state of the global generators does not change."""
        config = getattr(transformers, self.config)(**{**self.settings, **settings})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = getattr(transformers, self.model_class)(config).train()
        if getattr(made, "loss_type", "") is None:  # transformers' default; without it a warning breaks torch.compile
            made.loss_type = "ForCausalLM"
        return made

    def example_inputs(self, seed: int = 0) -> Inputs:
        """Return keyword arguments of a forward, including labels; the rows of a text have different lengths."""
        return self.draw(torch.Generator().manual_seed(seed))


def fill_adapters(model: nn.Module, seed: int = 0) -> None:
    """Fill PEFT's adapters of every layer and name so that the LoRA term is as large as the base's.

    PEFT initialises lora_B (and lora_embedding_A) to zero, which would hide errors of an adapter. For random X the root
    mean square of X W^T is |W| / sqrt(N) in Frobenius norms, that of s X (B A)^T with B of deviation b is s b |A|.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        weight = getattr(getattr(module, "base_layer", None), "weight", None)
        scaling = getattr(module, "scaling", {})
        if weight is None or not isinstance(scaling, dict):
            continue
        for name, s in scaling.items():
            for kind in ("lora_", "lora_embedding_"):
                pair = [getattr(module, kind + letter, {}) for letter in "AB"]
                if name in pair[0]:
                    A, B = (_data(parameters[name]) for parameters in pair)
                    _fill(A, B, weight, s, generator)


def _data(adapter: nn.Module | Tensor) -> Tensor:
    return (adapter if isinstance(adapter, Tensor) else adapter.weight).data  # type: ignore[return-value]


def _fill(A: Tensor, B: Tensor, weight: Tensor, scaling: float, generator: torch.Generator) -> None:
    if not A.any():
        A.copy_(torch.randn(A.shape, generator=generator))
    size = weight.float().norm() if weight.is_floating_point() else torch.tensor(SPREAD * weight.numel() ** 0.5)
    deviation = size / (B.shape[0] ** 0.5 * A.float().norm() * abs(scaling or 1.0))
    B.copy_(deviation.cpu() * torch.randn(B.shape, generator=generator))


def _tokens(generator: torch.Generator) -> Inputs:
    tokens = torch.randint(START + 1, VOCABULARY, (ROWS, TOKENS), generator=generator)
    lengths = torch.tensor([TOKENS, TOKENS - 3, TOKENS - 1])
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    return {"input_ids": torch.where(mask > 0, tokens, PAD), "attention_mask": mask}


def _sentences(generator: torch.Generator) -> Inputs:
    return {**_tokens(generator), "labels": torch.randint(3, (ROWS,), generator=generator)}


def _text(generator: torch.Generator) -> Inputs:
    inputs = _tokens(generator)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def _pairs(generator: torch.Generator) -> Inputs:
    return {**_tokens(generator), "labels": torch.randint(START + 1, VOCABULARY, (ROWS, 9), generator=generator)}


def _images(generator: torch.Generator) -> Inputs:
    pixels = torch.randn(ROWS, 3, 16, 16, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(3, (ROWS,), generator=generator)}


_NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 32, "initializer_range": SPREAD, "num_labels": 3,
    "pad_token_id": PAD,
}  # fmt: skip
_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64,
    "initializer_range": SPREAD, "pad_token_id": PAD, "bos_token_id": START, "eos_token_id": None,
}  # fmt: skip
_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = (*_QKVO, "gate_proj", "up_proj", "down_proj")


def _encoder(name: str, prefix: str, attention: tuple[str, ...], linear: tuple[str, ...], **settings: Any) -> Family:
    model_class = f"{prefix}ForSequenceClassification"
    return Family(name, "SEQ_CLS", f"{prefix}Config", model_class, attention, linear, _sentences, settings)


def _decoder(
    name: str, prefix: str, attention: tuple[str, ...], linear: tuple[str, ...], model_class: str = "", **settings: Any
) -> Family:
    config = prefix if prefix.endswith("Config") else f"{prefix}Config"
    made = model_class or f"{prefix}ForCausalLM"
    return Family(name, "CAUSAL_LM", config, made, attention, linear, _text, settings)


_BERT_LINEAR = ("query", "key", "value", "dense")
_GEMMA: dict[str, Any] = {**_DECODER, "attention_dropout": 0.0, "query_pre_attn_scalar": 12, "sliding_window": 8}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _encoder("BERT", "Bert", ("query", "value"), _BERT_LINEAR, **_ENCODER, **_NO_DROPOUT),
        _encoder("RoBERTa", "Roberta", ("query", "value"), _BERT_LINEAR, **_ENCODER, **_NO_DROPOUT),
        _encoder(
            "DistilBERT", "DistilBert", ("q_lin", "v_lin"), ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
            vocab_size=VOCABULARY, dim=48, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=32,
            initializer_range=SPREAD, num_labels=3, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
            pad_token_id=PAD,
        ),
        _decoder(
            "GPT-2", "GPT2", ("c_attn",), ("c_attn", "c_proj", "c_fc"), "GPT2LMHeadModel", vocab_size=VOCABULARY,
            n_embd=48, n_inner=64, n_layer=2, n_head=4, n_positions=64, initializer_range=SPREAD, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=PAD, bos_token_id=START, eos_token_id=None,
        ),
        _decoder("Llama", "Llama", _QKVO, _GATED, **_DECODER),
        _decoder("Qwen2", "Qwen2", _QKVO, _GATED, **_DECODER),
        _decoder("Qwen3", "Qwen3", _QKVO, _GATED, **_DECODER),
        _decoder("Mistral", "Mistral", _QKVO, _GATED, **_DECODER, sliding_window=8),
        _decoder("Gemma 2", "Gemma2", _QKVO, _GATED, **_GEMMA),
        _decoder("Gemma 3", "Gemma3TextConfig", _QKVO, _GATED, "Gemma3ForCausalLM", **_GEMMA),
        _decoder(
            "Phi", "Phi", ("q_proj", "k_proj", "v_proj", "dense"),
            ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"), **_DECODER, resid_pdrop=0.0,
        ),
        _decoder(
            "Phi-3", "Phi3", ("qkv_proj", "o_proj"), ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), **_DECODER
        ),
        _decoder(
            "OPT", "OPT", ("q_proj", "k_proj", "v_proj", "out_proj"),
            ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"), vocab_size=VOCABULARY, hidden_size=48, ffn_dim=64,
            word_embed_proj_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, dropout=0.0,
            init_std=SPREAD, pad_token_id=PAD, bos_token_id=START, eos_token_id=None,
        ),
        _decoder("Mixtral", "Mixtral", _QKVO, _QKVO, **_DECODER, num_local_experts=4, num_experts_per_tok=2,
                 experts_implementation="eager"),
        Family(
            "T5", "SEQ_2_SEQ_LM", "T5Config", "T5ForConditionalGeneration", ("q", "v"),
            ("q", "k", "v", "o", "wi_0", "wi_1", "wo"), _pairs,
            {
                "vocab_size": VOCABULARY, "d_model": 48, "d_kv": 12, "d_ff": 64, "num_layers": 2, "num_heads": 4,
                "dropout_rate": 0.0, "feed_forward_proj": "gated-gelu", "pad_token_id": PAD,
                "decoder_start_token_id": PAD, "eos_token_id": None,
            },
        ),
        Family(
            "Marian", "SEQ_2_SEQ_LM", "MarianConfig", "MarianMTModel", ("q_proj", "v_proj"),
            ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"), _pairs,
            {
                "vocab_size": VOCABULARY, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2,
                "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
                "decoder_ffn_dim": 64, "max_position_embeddings": 64, "dropout": 0.0, "init_std": SPREAD,
                "pad_token_id": PAD, "decoder_start_token_id": PAD, "eos_token_id": None, "forced_eos_token_id": None,
            },
        ),
        Family(
            "ViT", "", "ViTConfig", "ViTForImageClassification", ("q_proj", "v_proj"), (*_QKVO, "fc1", "fc2"), _images,
            {
                "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                "image_size": 16, "patch_size": 4, "initializer_range": SPREAD, "num_labels": 3, **_NO_DROPOUT,
            },
        ),
    )
}  # fmt: skip
