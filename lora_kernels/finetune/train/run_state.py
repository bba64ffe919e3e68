"""The state of a training run: everything needed to resume it with the same result."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from lora_kernels.finetune.train import processes
from lora_kernels.finetune.train.checkpoint import CheckpointError, checkpoints, load_newest, save_checkpoint
from lora_kernels.finetune.train.digest import data_digest, frozen_digest
from lora_kernels.finetune.train.options import History, TrainOptions
from lora_kernels.finetune.train.rng import loader_state, seed_all, set_loader_state

_VERSION = 2  # since 2 a state has digests of the data, the frozen weights and the file

# Facts that are digests of content: {name of the fact: what is different if the digest differs}.
DIGESTS = {
    "sha256 of the data": "other training data",
    "sha256 of the validation data": "other validation data",
    "sha256 of the frozen weights": "other frozen weights",
}


def content_digests(model: nn.Module, dataloader: Any, validation: Any) -> dict[str, str | None]:
    """Compute the digests named in DIGESTS. They are None, and not compared, for data that is not in memory."""
    digests = (data_digest(dataloader), data_digest(validation), frozen_digest(model))
    return dict(zip(DIGESTS, digests, strict=True))


def changing_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors that training changes: trainable parameters and persistent buffers."""
    kept = model.state_dict(keep_vars=True)
    return {
        name: tensor
        for name, tensor in kept.items()
        if isinstance(tensor, torch.Tensor) and (tensor.requires_grad or not isinstance(tensor, nn.Parameter))
    }


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy ``weights`` into the model. Raises CheckpointError, before any change, if names or shapes differ."""
    own = changing_weights(model)
    wrong = sorted(own.keys() ^ weights.keys())
    wrong += [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    if wrong:
        raise CheckpointError(f"the checkpoint is of another model: {len(wrong)} tensors differ, such as {wrong[0]}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


class RunState:
    """The progress of a run: epoch, position (batches of the epoch already used), history, best weights."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        options: TrainOptions,
        facts: Mapping[str, Any],
    ) -> None:
        self.model, self.optimizer, self.schedule, self.options = model, optimizer, schedule, options
        self.facts = json.loads(json.dumps(facts))
        self.history = History()
        self.epoch = 0
        self.position = 0
        self.best: dict[str, torch.Tensor] | None = None
        self._epoch_start: dict[str, Any] = {}
        self._now: dict[str, Any] | None = None

    def begin(self, resume: bool) -> None:
        """Start from the beginning, or from the newest checkpoint, which the first process reads and broadcasts.

        Processes use different seeds (seed, seed + 1, ...), so that their dropout masks differ.
        """
        state = processes.from_first(lambda: self._found(resume))
        if state is not None:
            self._restore(state)
        elif self.options.seed is not None:
            seed_all(self.options.seed + processes.rank())

    def _found(self, resume: bool) -> dict[str, Any] | None:
        folder = self.options.checkpoint_dir
        if resume and folder is None:
            raise CheckpointError("resume=True needs options.checkpoint_dir, the folder with the checkpoints")
        if folder is not None and not resume and checkpoints(folder):
            raise CheckpointError(f"{folder} holds checkpoints of an earlier run: resume it, or delete them")
        return load_newest(folder) if folder is not None and resume else None

    def batches(self, dataloader: Any) -> Iterator[Any]:
        """Iterate over the epoch's batches from ``position`` on, as in an uninterrupted run.

        The loader starts from the random state at the start of the epoch and is advanced to the position. Then the
        random state of the checkpoint is restored.
        """
        for name in ("sampler", "batch_sampler"):
            set_epoch = getattr(getattr(dataloader, name, None), "set_epoch", None)
            if set_epoch is not None:  # a DistributedSampler's order depends on it
                set_epoch(self.epoch)
        now, self._now = self._now, None
        if now is None:
            self._epoch_start = loader_state(dataloader)
            return iter(dataloader)
        if self.position == 0:
            set_loader_state(dataloader, now)
            self._epoch_start = now
            return iter(dataloader)
        set_loader_state(dataloader, self._epoch_start)
        batches = iter(dataloader)
        for _ in range(self.position):
            next(batches)
        set_loader_state(dataloader, now)
        return batches

    def save(self, dataloader: Any) -> None:
        """Write a checkpoint if the options name a folder. The first process writes it for all."""
        if self.options.checkpoint_dir is None:
            return
        (epoch_start, now), *others = processes.gathered((self._epoch_start, loader_state(dataloader)))
        if processes.rank() > 0:
            return
        state = {
            "version": _VERSION,
            "facts": self.facts,
            "weights": changing_weights(self.model),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "history": asdict(self.history),
            "epoch": self.epoch,
            "position": self.position,
            "best": self.best,
            "epoch_start": epoch_start,
            "now": now,
            "others": others,
        }
        save_checkpoint(self.options.checkpoint_dir, len(self.history.steps), state, self.options.keep)

    def _restore(self, state: dict[str, Any]) -> None:
        if state.get("version") != _VERSION:
            raise CheckpointError(f"the checkpoint has version {state.get('version')}; this program reads {_VERSION}")
        names = sorted(self.facts.keys() | state["facts"].keys())
        then = state["facts"]
        other = [name for name in names if then.get(name) != self.facts.get(name)]
        changed = [what for name, what in DIGESTS.items() if name in other]
        if changed:
            raise CheckpointError(
                f"the checkpoint was made with {' and '.join(changed)}: the content is not the same under the same "
                "names. Put the earlier content back, or start again in an empty folder"
            )
        if other:
            settings = ", ".join(f"{name} (then {then.get(name)!r}, now {self.facts.get(name)!r})" for name in other)
            raise CheckpointError(f"the checkpoint was made under other settings: {settings}")
        load_weights(self.model, state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.history = History(**state["history"])
        self.epoch, self.position, self.best = state["epoch"], state["position"], state["best"]
        states = [(state["epoch_start"], state["now"]), *state.get("others", [])]
        self._epoch_start, self._now = states[processes.rank()]
