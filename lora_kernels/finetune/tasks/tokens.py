"""What tasks share that predict tokens: loss, accuracy, perplexity."""

from __future__ import annotations

import math

import torch
from torch import nn

IGNORED = -100


class TokenLoss(nn.CrossEntropyLoss):
    """Mean cross entropy over the tokens that count, in float32 at least.

    logits (rows, length, vocabulary), targets (rows, length) of token ids, -100 where nothing is asked.
    """

    def __init__(self) -> None:
        super().__init__(ignore_index=IGNORED)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        flat = logits.flatten(0, -2)
        return super().forward(flat if flat.dtype == torch.float64 else flat.float(), targets.flatten())


def token_accuracy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Share of the tokens that count whose most probable prediction is right; NaN where none count."""
    counted = targets != IGNORED
    return (logits.argmax(-1) == targets)[counted].float().mean()


def perplexity(loss: float) -> float:
    """exp of the mean loss of a token in nats; infinity where that is too large for a float."""
    return math.exp(loss) if loss < 709 else math.inf
