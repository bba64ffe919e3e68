"""The options of a Trainer, validated once, and the history of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_kernels.errors import ConfigError
from lora_kernels.finetune.train.extras import installed
from lora_kernels.finetune.train.schedule import SCHEDULES


@dataclass(frozen=True)
class TrainOptions:
    """Options of a Trainer. Raises ConfigError for a value out of range.

    accumulate: batches per optimizer step; their gradients are weighted so that the step equals one big batch's.
    clip_norm: the global L2 norm that gradients are clipped to; None for no clipping.
    bf16: forward and loss run under torch.autocast(bfloat16).
    schedule, warmup: see schedule.py; a warmup below 1 is a share of all steps, from 1 up a number of steps.
    seed: seeds every generator when training starts; None changes no generator.
    patience: stop after this many epochs without a better ``monitor`` on the validation data, and restore the weights
        of the best epoch. "loss" is better when lower, any other metric when higher.
    checkpoint_dir, checkpoint_every, keep: write a checkpoint at the end of every epoch and, with checkpoint_every > 0,
        after every checkpoint_every optimizer steps; the newest ``keep`` are kept.
    settings: further values that decide the result; resuming under other settings is refused.
    progress: show a progress bar with loss and tokens/s; None: only if tqdm is installed.
    """

    accumulate: int = 1
    clip_norm: float | None = None
    bf16: bool = False
    schedule: str = "constant"
    warmup: float = 0.0
    seed: int | None = None
    patience: int | None = None
    monitor: str = "loss"
    checkpoint_dir: Path | None = None
    checkpoint_every: int = 0
    keep: int = 2
    settings: Mapping[str, Any] = field(default_factory=dict)
    progress: bool | None = None

    def __post_init__(self) -> None:
        for name, least in (("accumulate", 1), ("keep", 1), ("checkpoint_every", 0), ("warmup", 0)):
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise ConfigError(f"{name} is {value}; it must be at least {least}, and finite")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"clip_norm is {self.clip_norm}; it must be above 0, or None for no clipping")
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"patience is {self.patience}; it must be at least 1, or None to never stop early")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule is {self.schedule!r}; it must be one of {', '.join(SCHEDULES)}")

    @property
    def shows_progress(self) -> bool:
        """Whether a run shows a progress bar and a line per epoch."""
        return installed("tqdm") if self.progress is None else self.progress

    def decisive(self, epochs: int, batches: int) -> dict[str, Any]:
        """Return the values that must not change when a run is resumed, since they decide its result."""
        names = ("accumulate", "clip_norm", "bf16", "schedule", "warmup", "seed", "patience", "monitor")
        facts = {**self.settings, **{name: getattr(self, name) for name in names}, "batches": batches}
        if self.schedule != "constant" or 0 < self.warmup < 1:
            facts["epochs"] = epochs  # a schedule without decay or warm-up allows more epochs
        return facts


@dataclass
class History:
    """The record of a run: one entry per optimizer step, one per epoch.

    steps: {"step", "epoch", "loss", "weight", "lr"}; epochs: {"epoch", "loss"} and validation figures as "val_...".
    tokens and seconds count training steps only, including those before an interruption.
    best: the best epoch's value of the monitored figure; stale: epochs since then; stopped_early.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    best: float | None = None
    stale: int = 0
    stopped_early: bool = False
