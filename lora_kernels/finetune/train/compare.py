"""Compare the time of training steps with PEFT's: in one process, on the same batches, in alternation."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_kernels.finetune.train.batch import call_model, split_batch, to_device
from lora_kernels.finetune.train.extras import require


def peft_model(base: nn.Module, adapter: Path) -> nn.Module:
    """Build PEFT's trainable model from ``base`` and a saved adapter."""
    return require("peft").PeftModel.from_pretrained(base, str(adapter), is_trainable=True)


def _seconds(
    model: nn.Module, batch: Any, criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], device: torch.device
) -> float:
    inputs, targets = split_batch(to_device(batch, device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    criterion(call_model(model, inputs), targets).backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elapsed = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    return elapsed


def interleaved(
    ours: nn.Module,
    theirs: nn.Module,
    batches: Sequence[Any],
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    device: torch.device | str = "cpu",
    rounds: int = 16,
) -> dict[str, float]:
    """Time forward and backward of ``rounds`` batches through both models in training mode, in alternating order.

    Returns medians in milliseconds ("ours_ms", "theirs_ms"), and the median and 20th and 80th percentile of the
    per-batch ratio ours / theirs ("ratio", "ratio_p20", "ratio_p80").
    """
    device = torch.device(device)
    pair = (ours.train(), theirs.train())
    for model in pair:
        _seconds(model, batches[0], criterion, device)  # warm-up: the first step does work that later ones reuse
    times: list[tuple[float, float]] = []
    for number, batch in enumerate(itertools.islice(itertools.cycle(batches), rounds)):
        first = number % 2
        one = _seconds(pair[first], batch, criterion, device)
        other = _seconds(pair[1 - first], batch, criterion, device)
        times.append((other, one) if first else (one, other))
    ratios = sorted(mine / other for mine, other in times)
    fifths = statistics.quantiles(ratios, n=5, method="inclusive")
    return {
        "ours_ms": 1e3 * statistics.median(mine for mine, _ in times),
        "theirs_ms": 1e3 * statistics.median(other for _, other in times),
        "ratio": statistics.median(ratios),
        "ratio_p20": fifths[0],
        "ratio_p80": fifths[3],
        "rounds": float(rounds),
    }
