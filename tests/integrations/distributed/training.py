"""finetune.Trainer in a process group: each step is one process's step on the whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from fsdp import by_block
from tiny import CLASSES, LENGTH, WIDTH, alike, build, judge, sgd, trained
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lora_kernels as lk
from lora_kernels.errors import ConfigError
from lora_kernels.finetune.train import processes
from lora_kernels.finetune.train.checkpoint import CheckpointError, checkpoints
from lora_kernels.finetune.train.options import History, TrainOptions
from lora_kernels.finetune.train.trainer import Trainer

ROWS, IGNORED = 25, -100  # of batches of 8 the last has one row: nothing for the second process


class TokenLoss(nn.CrossEntropyLoss):
    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return super().forward(logits.flatten(0, -2), targets.flatten())


def rows(dtype: torch.dtype = torch.float32) -> TensorDataset:
    """Sequences of which the tail is ignored, so that no two shares of a batch weigh the same."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, LENGTH, WIDTH, generator=generator).to(dtype)
    y = torch.randint(0, CLASSES, (ROWS, LENGTH), generator=generator)
    y[torch.arange(LENGTH) > torch.randint(-1, LENGTH, (ROWS, 1), generator=generator)] = IGNORED
    return TensorDataset(x, y)


@contextmanager
def alone() -> Iterator[None]:
    """As if this process were the only one."""
    with patch.object(processes, "count", lambda: 1), patch.object(processes, "rank", lambda: 0):
        yield


def correct(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    counted = targets != IGNORED
    return (logits.argmax(-1) == targets)[counted].float().mean()


def run(
    model: nn.Module, dtype: torch.dtype = torch.float32, epochs: int = 2, resume: bool = False, **options: Any
) -> History:
    settings = {"accumulate": 2, "clip_norm": 1.0, "seed": 5, "progress": False, "patience": 9} | options
    optimizer = sgd([p for p in model.parameters() if p.requires_grad])
    trainer = Trainer(model, optimizer, TokenLoss(), options=TrainOptions(**settings), metrics={"correct": correct})
    data = rows(dtype)
    return trainer.train(DataLoader(data, 8, shuffle=True), DataLoader(data, 8), epochs, resume)


def steps_are_those_of_the_whole_batch(folder: Path) -> None:
    got, plain, truth = build(), build(plain=True), build(plain=True, dtype=torch.float64)
    history = run(got)
    with alone():
        one = run(plain)
        run(truth, torch.float64)
    weights = trained(got)
    assert all(alike(tensor) for tensor in weights.values())
    judge(weights, trained(plain), trained(truth))
    assert (history.tokens, len(history.steps)) == (one.tokens, len(one.steps))
    for mine, whole in zip([*history.steps, *history.epochs], [*one.steps, *one.epochs], strict=True):
        assert mine == pytest.approx(whole, rel=1e-4)


def wrapped_and_sampled_by_the_user(folder: Path) -> None:
    """A DDP model and a DistributedSampler of the user's are taken as they are."""
    model, data = DDP(build()), rows()
    trainer = Trainer(model, sgd([p for p in model.parameters() if p.requires_grad]), TokenLoss())
    history = trainer.train(DataLoader(data, 4, sampler=DistributedSampler(data, shuffle=False)))
    assert len(history.steps) == 4
    assert all(alike(tensor) for tensor in trained(trainer.model).values())


class Stop(Exception):
    pass


def dropping() -> nn.Module:
    model = build()
    for layer in model.modules():
        if isinstance(layer, lk.LoRALinear):
            layer.lora_dropout = 0.2
    return model


def interrupted_and_resumed_is_the_same(folder: Path) -> None:
    options = {"checkpoint_every": 1, "accumulate": 1}
    whole = dropping()
    history = run(whole, checkpoint_dir=folder / "whole", **options)
    step, calls = Trainer._step, []

    def interrupted(self: Trainer, *args: Any) -> Any:
        calls.append(1)
        if len(calls) in (3, 8):
            raise Stop
        return step(self, *args)

    for start in range(2):
        with pytest.raises(Stop), patch.object(Trainer, "_step", interrupted):
            run(dropping(), resume=start > 0, checkpoint_dir=folder / "parts", **options)
    with pytest.raises(CheckpointError, match="holds checkpoints of an earlier run"):  # in both processes
        run(dropping(), checkpoint_dir=folder / "parts", **options)
    with alone(), pytest.raises(CheckpointError, match="processes \\(then 2, now None\\)"):
        run(dropping(), resume=True, checkpoint_dir=folder / "parts", **options)
    parts = dropping()
    resumed = run(parts, resume=True, checkpoint_dir=folder / "parts", **options)
    assert resumed.steps == history.steps
    weights = trained(parts)
    assert all(torch.equal(weights[name], tensor) and alike(tensor) for name, tensor in trained(whole).items())
    assert len(checkpoints(folder / "parts")) == 2


def masks_differ(folder: Path) -> None:
    seen = []
    for _ in range(2):
        run(dropping(), seed=5, epochs=1)
        assert torch.initial_seed() == 5 + dist.get_rank()
        seen.append(torch.get_rng_state())
    assert torch.equal(*seen)


def refusals(folder: Path) -> None:
    sharded = by_block(build())
    with pytest.raises(ConfigError, match="train a sharded one \\(FSDP2\\) in a loop of your own"):
        run(sharded)
    trainer = Trainer(build(), torch.optim.SGD([torch.ones(1)]), TokenLoss())
    with pytest.raises(ConfigError, match="2 processes cannot divide a list"):
        trainer.train([1, 2])
