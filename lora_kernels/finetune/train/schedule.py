"""Learning-rate schedules: a linear warm-up, then constant, linear or cosine decay."""

from __future__ import annotations

import math

import torch

from lora_kernels.errors import ConfigError

SCHEDULES = ("constant", "linear", "cosine")


def warmup_steps(warmup: float, steps: int) -> int:
    """Convert ``warmup`` to steps: below 1 it is a share of all steps (rounded up), else a number of steps."""
    return min(steps, math.ceil(warmup * steps) if warmup < 1 else int(warmup))


def learning_rate_factor(step: int, *, kind: str, warmup: int, steps: int) -> float:
    """Compute the factor on the base learning rate for optimizer step ``step`` (from 0).

    It rises to 1 over ``warmup`` steps, starting above 0, then falls to 0 at ``steps``.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    if kind == "linear":
        return 1.0 - progress
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0


def make_schedule(
    optimizer: torch.optim.Optimizer, kind: str, warmup: float, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Make a LambdaLR for ``steps`` optimizer steps. Raises ConfigError for an unknown kind or a negative warm-up."""
    if kind not in SCHEDULES:
        raise ConfigError(f"schedule is {kind!r}; it must be one of {', '.join(SCHEDULES)}")
    if not warmup >= 0:
        raise ConfigError(f"warmup is {warmup}; give a share of all steps below 1, or a number of steps")
    first = warmup_steps(warmup, steps)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, kind=kind, warmup=first, steps=steps)
    )
