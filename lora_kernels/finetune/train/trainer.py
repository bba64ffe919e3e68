"""Trainer: a training loop that can be killed at any moment and resumed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import nn

from lora_kernels.errors import ConfigError, LoRAKernelsError
from lora_kernels.finetune.train import processes
from lora_kernels.finetune.train.bar import ProgressBar
from lora_kernels.finetune.train.batch import call_model, count_tokens, loss_weight, split_batch, to_device
from lora_kernels.finetune.train.options import History, TrainOptions
from lora_kernels.finetune.train.rng import rng_state, set_rng_state
from lora_kernels.finetune.train.run_state import RunState, changing_weights, content_digests, load_weights
from lora_kernels.finetune.train.schedule import make_schedule
from lora_kernels.models.explain import unwrap

Metric = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | float]


class TrainingError(LoRAKernelsError, RuntimeError):
    """Training stopped because the loss is not finite."""


class Trainer:
    """Train and evaluate ``model``.

    optimizer: any torch.optim optimizer over the trainable parameters.
    criterion: ``criterion(logits, targets)``, a mean over its targets (or a sum: ``reduction="sum"``).
    batches: (inputs, targets), or dicts with "labels", as Hugging Face collators make them; see batch.py.
    metrics: name -> function of (logits, targets) that returns a mean over the batch; shown with the validation loss.
    scheduler: stepped after each optimizer step; None: made from the options.

    With ``options.checkpoint_dir`` a run can be killed at any moment. ``train(..., resume=True)`` then ends with the
    result of an uninterrupted run, bit for bit on the same machine. A checkpoint holds trainable parameters, buffers,
    optimizer, schedule, random states, the position in the data and the history. It does not contain the frozen weights
    and the data: build the same ones before you resume. Digests of the frozen weights, and of data in memory
    (digest.data_digest), are compared; a checkpoint with other digests is refused.

    In a process group (torchrun) each batch of ``dataloader`` is divided among the processes. A step equals that of one
    process on the whole batch, also if the shares have unequal weights. Gradients are averaged by
    DistributedDataParallel, in which ``model`` may be wrapped already. The first process draws the order of the data
    and writes files.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        device: torch.device | str = "cpu",
        options: TrainOptions | None = None,
        *,
        metrics: Mapping[str, Metric] | None = None,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    ) -> None:
        self.device = torch.device(device)
        self._replica = model.to(self.device)
        self._idle: set[int] = set()  # numbers of the epoch's batches without a row for this process
        self.model = unwrap(model) if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.optimizer = optimizer
        self.criterion = criterion.to(self.device) if isinstance(criterion, nn.Module) else criterion
        self.options = options or TrainOptions()
        self.metrics = dict(metrics or {})
        self.scheduler = scheduler
        if self.options.monitor not in ("loss", *self.metrics):
            raise ConfigError(f"monitor is {self.options.monitor!r}; there are {['loss', *self.metrics]}")

    def train(self, dataloader: Any, validation: Any = None, epochs: int = 1, resume: bool = False) -> History:
        """Train for ``epochs`` passes over ``dataloader``, and evaluate on ``validation`` after each.

        resume: continue from the newest intact checkpoint, or start if there is none. Without it, a folder with
        checkpoints raises CheckpointError. A loss that is not finite raises TrainingError.
        """
        options = self.options
        if epochs < 1 or not hasattr(dataloader, "__len__") or not len(dataloader):
            raise ConfigError(f"nothing to train on: {epochs} epochs of a dataloader that is empty or has no length")
        if options.patience is not None and validation is None:
            raise ConfigError("early stopping (patience) needs validation data")
        contents = content_digests(self.model, dataloader, validation) if options.checkpoint_dir is not None else {}
        dataloader, self._replica = processes.divided(dataloader), processes.replicated(self._replica)
        steps = epochs * math.ceil(len(dataloader) / options.accumulate)
        schedule = self.scheduler or make_schedule(self.optimizer, options.schedule, options.warmup, steps)
        facts = options.decisive(epochs, len(dataloader)) | contents
        if processes.count() > 1:
            facts["processes"] = processes.count()
        run = RunState(self.model, self.optimizer, schedule, options, facts)
        run.begin(resume)
        while run.epoch < epochs and not run.history.stopped_early:
            self._train_epoch(run, dataloader, epochs)
            self._finish_epoch(run, validation)
            run.save(dataloader)
        if run.best is not None:
            load_weights(self.model, run.best)
        return run.history

    @torch.no_grad()
    def predict(self, dataloader: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (logits, targets) of each batch in eval mode. Training mode and random states are restored."""
        training, state = self.model.training, rng_state()
        self.model.eval()
        try:
            for batch in dataloader:
                inputs, targets = split_batch(to_device(batch, self.device))
                with self._autocast():
                    logits = call_model(self.model, inputs)
                yield logits, targets
        finally:
            self.model.train(training)
            set_rng_state(state)

    @torch.no_grad()
    def evaluate(self, dataloader: Any) -> dict[str, float]:
        """Compute mean loss and metrics over ``dataloader``, in this process only: {"loss": ..., **metrics}."""
        return self._means(self._sums(dataloader))

    def _means(self, sums: list[float]) -> dict[str, float]:
        counted, *totals = sums
        means = [total / counted if counted else math.nan for total in totals]
        return dict(zip(("loss", *self.metrics), means, strict=True))

    @torch.no_grad()
    def _sums(self, dataloader: Any) -> list[float]:
        """Sum the batches' weights, and the weighted loss and metrics."""
        sums = [0.0] * (2 + len(self.metrics))
        for logits, targets in self.predict(dataloader):
            weight = loss_weight(self.criterion, targets)
            if not weight:
                continue
            values = [self.criterion(logits, targets), *(metric(logits, targets) for metric in self.metrics.values())]
            sums[0] += weight
            for i, value in enumerate(values, start=1):
                sums[i] += float(value) * weight
        return sums

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.options.bf16)

    @property
    def _shows_progress(self) -> bool:
        return self.options.shows_progress and processes.rank() == 0

    def _train_epoch(self, run: RunState, dataloader: Any, epochs: int) -> None:
        """Train from the run's position to the epoch's end."""
        options, history = self.options, run.history
        self._replica.train()
        batches = run.batches(dataloader)
        self._idle = getattr(getattr(dataloader, "batch_sampler", None), "idle", self._idle)
        title = f"epoch {run.epoch + 1}/{epochs}"
        with ProgressBar(title, len(dataloader), run.position, self._shows_progress) as bar:
            begun = time.perf_counter()
            while group := list(islice(batches, options.accumulate)):
                record, tokens = self._step(run, group)
                run.position += len(group)
                now = time.perf_counter()
                history.steps.append(record)
                history.tokens += tokens
                history.seconds += now - begun
                begun = now
                bar.advance(len(group), record["loss"], tokens)
                every = options.checkpoint_every
                if every and len(history.steps) % every == 0 and run.position < len(dataloader):
                    run.save(dataloader)
                    begun = time.perf_counter()

    def _step(self, run: RunState, group: list[Any]) -> tuple[dict[str, float], int]:
        """Do one optimizer step over a group of batches. Return its record and its number of tokens."""
        step = len(run.history.steps) + 1
        rate = self.optimizer.param_groups[0]["lr"]
        parts = [split_batch(to_device(batch, self.device)) for batch in group]
        has_rows = [run.position + i not in self._idle for i in range(len(group))]
        weights = [loss_weight(self.criterion, y) if own else 0.0 for (_, y), own in zip(parts, has_rows, strict=True)]
        total_weights = processes.total(weights, self.device)
        summed = getattr(self.criterion, "reduction", "mean") == "sum"
        divisor = 1.0 if summed else sum(total_weights)
        count = processes.count()  # cancels the division of DistributedDataParallel: gradients are summed
        loss_sum = torch.zeros((), device=self.device)
        used = [i for i, weight in enumerate(total_weights) if weight]
        for i in used:  # in the others every target is ignored, and the mean over no target would be NaN
            inputs, targets = parts[i]
            with processes.averaging(self._replica, i == used[-1]):
                with self._autocast():
                    logits = call_model(self._replica, inputs)
                    if weights[i]:
                        loss = self.criterion(logits, targets) * (weights[i] * count / divisor)
                    else:
                        loss = logits.sum() * 0.0  # takes part in the all-reduce of the gradients
                loss.backward()
            loss_sum += loss.detach()
        value = float(loss_sum) / count  # synchronizes with the device
        own_tokens = sum(count_tokens(*part) for part, own in zip(parts, has_rows, strict=True) if own)
        value, tokens = processes.total([value, own_tokens], self.device)
        if not math.isfinite(value):
            raise TrainingError(f"the loss is {value} at step {step}; lower the learning rate or clip the gradients")
        if self.options.clip_norm is not None:
            parameters = [p for part in self.optimizer.param_groups for p in part["params"]]
            nn.utils.clip_grad_norm_(parameters, self.options.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        run.schedule.step()
        record = {"step": step, "epoch": run.epoch, "loss": value, "weight": sum(total_weights), "lr": rate}
        return record, int(tokens)

    def _finish_epoch(self, run: RunState, validation: Any) -> None:
        """Record the epoch and, with early stopping, the best epoch's weights."""
        options, history = self.options, run.history
        steps = [record for record in history.steps if record["epoch"] == run.epoch]
        total = sum(record["weight"] for record in steps)
        loss = sum(record["loss"] * record["weight"] for record in steps) / total if total else math.nan
        record = {"epoch": run.epoch, "loss": loss}
        if validation is not None:
            sums = processes.total(self._sums(processes.every_other(validation)), self.device)
            record |= {f"val_{name}": value for name, value in self._means(sums).items()}
        history.epochs.append(record)
        run.epoch, run.position = run.epoch + 1, 0
        if self._shows_progress:
            figures = ", ".join(f"{name} {value:.4f}" for name, value in record.items() if name != "epoch")
            ProgressBar.write(f"epoch {run.epoch}: {figures}")
        if options.patience is None:
            return
        value = record[f"val_{options.monitor}"]
        best = history.best
        better = best is None or (value < best if options.monitor == "loss" else value > best)
        history.stale = 0 if better else history.stale + 1
        history.stopped_early = history.stale >= options.patience
        if better:
            history.best = value
            run.best = {name: tensor.detach().clone() for name, tensor in changing_weights(self.model).items()}
