"""Loss, accuracy and perplexity of tasks that predict tokens."""

from __future__ import annotations

import math

import torch
from torch import nn

IGNORED = -100


class TokenLoss(nn.CrossEntropyLoss):
    """Mean cross entropy over the targets that are not -100, computed in float32 or float64.

    logits (rows, length, vocabulary); targets (rows, length) of token ids, or -100 at positions to ignore.
    """

    def __init__(self) -> None:
        super().__init__(ignore_index=IGNORED)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        flat = logits.flatten(0, -2)
        return super().forward(flat if flat.dtype == torch.float64 else flat.float(), targets.flatten())


def token_accuracy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute the share of targets other than -100 that are predicted correctly; NaN if there are none."""
    counted = targets != IGNORED
    return (logits.argmax(-1) == targets)[counted].float().mean()


def perplexity(loss: float) -> float:
    """Compute exp(loss) from the mean loss per token in nats; infinity where it exceeds the largest float."""
    return math.exp(loss) if loss < 709 else math.inf
