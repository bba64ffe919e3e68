import math

import pytest
import torch

from lora_kernels.finetune.tasks.tokens import IGNORED, TokenLoss, perplexity, token_accuracy
from lora_kernels.finetune.train.batch import loss_weight


def test_loss_and_accuracy_are_means_over_the_tokens_that_count():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [5.0, 0.0]], [[0.0, 3.0], [9.0, 0.0], [9.0, 0.0]]])
    targets = torch.tensor([[0, 0, IGNORED], [1, IGNORED, IGNORED]])
    losses = [math.log(1 + math.exp(x)) for x in (-2.0, 1.0, -3.0)]
    criterion = TokenLoss()
    assert float(criterion(logits, targets)) == pytest.approx(sum(losses) / 3)
    assert loss_weight(criterion, targets) == 3
    assert float(token_accuracy(logits, targets)) == pytest.approx(2 / 3)
    assert criterion(logits.double(), targets).dtype == torch.float64
    assert criterion(logits.bfloat16(), targets).dtype == torch.float32


def test_perplexity():
    assert perplexity(math.log(7.0)) == pytest.approx(7.0)
    assert perplexity(1e4) == math.inf
