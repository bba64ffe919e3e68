"""Batches: (inputs, targets), or a dict as Hugging Face collators make it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_kernels.errors import LoRAKernelsError

_TARGET_KEYS = ("labels", "label", "targets")


def to_device(value: Any, device: torch.device) -> Any:
    """Move every tensor in nested dicts, lists and tuples to ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(item, device) for item in value)
    return value


def split_batch(batch: Any) -> tuple[Any, torch.Tensor]:
    """Split a batch into (inputs, targets). A dict's targets have the key "labels", "label" or "targets"."""
    if isinstance(batch, Mapping):
        for key in _TARGET_KEYS:
            if key in batch:
                return {name: item for name, item in batch.items() if name != key}, batch[key]
        raise LoRAKernelsError(f"a dict batch needs one of {_TARGET_KEYS}; this one has {sorted(batch)}")
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[0], batch[1]
    raise LoRAKernelsError(f"a batch is (inputs, targets) or a dict with labels, not {type(batch).__name__}")


def call_model(model: nn.Module, inputs: Any) -> torch.Tensor:
    """Compute logits. A dict is passed as keyword arguments, a tuple as positional ones.

    Of an output object, its ``logits`` are returned, else its first item.
    """
    if isinstance(inputs, Mapping):
        outputs = model(**inputs)
    elif isinstance(inputs, list | tuple):
        outputs = model(*inputs)
    else:
        outputs = model(inputs)
    if isinstance(outputs, torch.Tensor):
        return outputs
    logits = getattr(outputs, "logits", None)
    return logits if logits is not None else outputs[0]


def loss_weight(criterion: Any, targets: torch.Tensor) -> float:
    """Return the divisor of the criterion's mean over a batch. It weights batches of unequal size.

    For float targets: the number of rows. For class indices: the number of targets other than ``ignore_index``, or the
    sum of their class weights if the criterion has weights. For reduction="sum": 1.
    """
    if getattr(criterion, "reduction", "mean") == "sum":
        return 1.0
    if targets.is_floating_point() or not hasattr(criterion, "ignore_index"):
        return float(targets.shape[0]) if targets.ndim else 1.0
    counted = targets[targets != criterion.ignore_index]
    weight = getattr(criterion, "weight", None)
    return float(counted.numel() if weight is None else weight[counted].sum())


def count_tokens(inputs: Any, targets: torch.Tensor) -> int:
    """Count a batch's tokens without padding; for inputs without tokens, its rows."""
    if isinstance(inputs, Mapping):
        for key in ("attention_mask", "input_ids"):
            if key in inputs:
                return int(inputs[key].sum()) if key == "attention_mask" else inputs[key].numel()
    return int(targets.shape[0]) if targets.ndim else 1
