"""Which module is the input embedding, what shares its weight, and which rows of it are trained."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lora_kernels.config import LoRAConfig
from lora_kernels.errors import ConfigError
from lora_kernels.models.embeddings import embeddings, input_embedding, kept_tied, tied_to_embedding, trained_tokens
from lora_kernels.models.explain import TrainedTokens
from lora_kernels.models.inject import plan_injection


class Model(nn.Module):
    def __init__(self, tie: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(tie_word_embeddings=tie)
        self.embed_tokens, self.q, self.lm_head = nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.q(self.embed_tokens(ids)))


def test_where_the_embeddings_are() -> None:
    assert input_embedding(nn.Linear(2, 2)) is None
    assert embeddings(nn.Linear(2, 2)) == []
    assert embeddings(Model(True)) == ["embed_tokens", "lm_head"]
    assert tied_to_embedding(Model(True)) == ("lm_head",)
    assert tied_to_embedding(Model(False)) == ()  # one Parameter, but the configuration does not tie them


@pytest.mark.parametrize(
    ("tie", "rows", "expected"),
    [
        (True, [1, 2], [TrainedTokens("embed_tokens", (1, 2), ("lm_head",))]),
        (False, [1, 2], [TrainedTokens("embed_tokens", (1, 2))]),
        (True, {"lm_head": [1]}, [TrainedTokens("lm_head", (1,))]),
        (True, {"lm_head": [1], "embed_tokens": [1]}, [TrainedTokens("embed_tokens", (1,), ("lm_head",))]),
        (True, {"lm_head": [1], "tokens": [2]}, [TrainedTokens("lm_head", (1,)), TrainedTokens("embed_tokens", (2,))]),
        (True, None, []),
        (True, {}, []),
    ],
)  # fmt: skip
def test_trained_rows(tie: bool, rows: object, expected: list[TrainedTokens]) -> None:
    assert list(trained_tokens(Model(tie), LoRAConfig(trainable_token_indices=rows))) == expected


def test_one_module_by_two_names_with_other_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="two lists of rows for embed_tokens"):
        trained_tokens(Model(True), LoRAConfig(trainable_token_indices={"tokens": [1], "embed_tokens": [2]}))


def test_what_is_trained_as_one_weight() -> None:
    config = LoRAConfig(target_modules=["q"], modules_to_save=["lm_head"], ensure_weight_tying=True)
    assert kept_tied(Model(True), config) == ("embed_tokens", "lm_head")
    assert plan_injection(Model(True), config).saved == ("embed_tokens", "lm_head")
    assert plan_injection(Model(False), config).saved == ("lm_head",)
    biased = Model(True)
    biased.lm_head.bias = nn.Parameter(torch.zeros(10))
    with pytest.raises(ConfigError, match="lm_head shares its weight and has a bias"):
        plan_injection(biased, config)
    alone = LoRAConfig(target_modules=["q"], ensure_weight_tying=True)
    assert kept_tied(Model(True), alone) == ()
    assert plan_injection(Model(True), alone).saved == ()
