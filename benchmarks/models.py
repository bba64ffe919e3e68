"""Models and data for whole training runs: shapes of Llama and BERT with random weights, nothing downloaded.

The data can be learnt: a Llama-shaped model gets sequences in which a fixed permutation says which token follows nine
times of ten, a BERT must tell which half of the vocabulary a sentence draws most of its tokens from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """One model and its batch: width, inner width, layers, heads, heads of k and v, vocabulary; rows, tokens a row."""

    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    rows: int
    tokens: int

    @property
    def batch_tokens(self) -> int:
        return self.rows * self.tokens


SIZES = {  # by model: for a rehearsal in the interpreter, for a CPU, for a GPU
    "llama": {
        "rehearsal": Size(32, 48, 1, 2, 1, 64, 2, 8),
        "cpu": Size(256, 688, 4, 8, 4, 512, 4, 64),
        "gpu": Size(4096, 14336, 4, 32, 8, 32000, 4, 2048),  # Llama-3 8B's layers, four of them
    },
    "bert": {
        "rehearsal": Size(32, 64, 1, 2, 2, 64, 2, 8),
        "cpu": Size(256, 1024, 4, 4, 4, 512, 8, 64),
        "gpu": Size(768, 3072, 12, 12, 12, 30522, 64, 128),  # BERT-base
    },
}


def build(model: str, size: Size, device: torch.device, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """The model in training mode, dropout 0, the same weights for the same seed."""
    import transformers  # an optional dependency: only a whole run needs it

    torch.manual_seed(seed)
    common: dict[str, Any] = {
        "hidden_size": size.width, "intermediate_size": size.inner, "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads, "vocab_size": size.vocabulary,
        "max_position_embeddings": max(64, size.tokens),
    }  # fmt: skip
    made: nn.Module
    with device:  # a GPU draws a billion values in no time
        if model == "llama":
            config = transformers.LlamaConfig(num_key_value_heads=size.kv_heads, use_cache=False, **common)
            made = transformers.LlamaForCausalLM(config)
        else:
            off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
            config = transformers.BertConfig(num_labels=2, **off, **common)
            made = transformers.BertForSequenceClassification(config)
    return made.to(device, dtype).train()


def batches(model: str, size: Size, count: int, device: torch.device, seed: int = 1) -> list[Batch]:
    """``count`` batches, the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    draw: Callable[[Size, torch.Generator], Batch] = _sequences if model == "llama" else _sentences
    return [{name: t.to(device) for name, t in draw(size, generator).items()} for _ in range(count)]


def _sequences(size: Size, generator: torch.Generator) -> Batch:
    follows = torch.randperm(size.vocabulary, generator=torch.Generator().manual_seed(0))
    shape = size.rows, size.tokens
    tokens = torch.randint(size.vocabulary, shape, generator=generator)
    obeys = torch.rand(shape, generator=generator) < 0.9
    for column in range(1, size.tokens):
        tokens[:, column] = torch.where(obeys[:, column], follows[tokens[:, column - 1]], tokens[:, column])
    return {"input_ids": tokens, "labels": tokens}


def _sentences(size: Size, generator: torch.Generator) -> Batch:
    labels = torch.randint(2, (size.rows,), generator=generator)
    half = size.vocabulary // 2
    tokens = torch.randint(half, (size.rows, size.tokens), generator=generator)
    upper = torch.rand(size.rows, size.tokens, generator=generator) < torch.where(labels > 0, 0.8, 0.2)[:, None]
    return {"input_ids": tokens + half * upper, "labels": labels, "attention_mask": torch.ones_like(tokens)}


def rows_reversed(batch: Batch) -> Batch:
    """The same loss and gradients, summed in another order."""
    return {name: tensor.flip(0) for name, tensor in batch.items()}


def rows_rotated(batch: Batch) -> Batch:
    """The same loss and gradients, summed in a third order."""
    return {name: tensor.roll(1, 0) for name, tensor in batch.items()}
