"""Runs a PEFT layer that is called with adapter_names, a batch of several adapters, by multi_lora_linear.

    y[i] = x[i] W^T + bias + scaling_l x[i] A_l^T B_l^T

l is the adapter that adapter_names[i] names, or none. PEFT gathers and scatters the rows of one adapter after another.
Here the adapters of the batch are concatenated at each call; lora_kernels.AdapterPool stores them concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.autograd.multi_lora_linear import multi_lora_linear_unchecked
from lora_kernels.integrations.peft.adapter import read_adapter
from lora_kernels.operands.slots import BASE, Slots

_ids: tuple[tuple[Any, ...], Tensor] | None = None


def mixed_forward(layer: Any, x: Tensor, names: Sequence[str], W: Tensor, bias: Tensor | None) -> Tensor | str:
    """Return y (..., N) for x (batch, ..., K) and one name per row of the batch, or the reason why PEFT's own forward
    runs."""
    held = layer._modules["lora_A"]._modules
    there = [name for name in dict.fromkeys(names) if name != BASE and name in held]
    parts = []
    for name in there:
        if name in layer.lora_variant:
            return f"{type(layer.lora_variant[name]).__name__} in a batch of several adapters"
        part = read_adapter(layer, name, x.dtype)
        if isinstance(part, str):
            return part
        if part[2] is not None or part[4] > 0.0:
            return "lora_bias or dropout in a batch of several adapters"
        parts.append(part)
    if not parts:
        return "no adapter of the batch is on it"
    A, B, _, scalings, _ = zip(*parts, strict=True)
    slots = Slots.of(A, B, None, scalings)  # at each call: a change through .data does not change a tensor's version
    return multi_lora_linear_unchecked(x, W, slots, _ids_of(names, there, x), bias)


def _ids_of(names: Sequence[str], there: list[str], x: Tensor) -> Tensor:
    """Return int32 (M,), the slot of each row of x; cached for the other layers of the model."""
    global _ids
    if torch.compiler.is_compiling():
        return _made(names, there, x)
    key = (tuple(names), tuple(there), x.shape[:-1], x.device)
    last = _ids  # read once: another thread may replace it at any time
    if last is None or last[0] != key:
        with torch.inference_mode(False):  # a forward with gradients may read it next
            last = _ids = key, _made(names, there, x)
    return last[1]


def _made(names: Sequence[str], there: list[str], x: Tensor) -> Tensor:
    slot = {name: number for number, name in enumerate(there)}
    ids = torch.tensor([slot.get(name, -1) for name in names], dtype=torch.int32, device="cpu").to(x.device)
    return ids.view(-1, *(1,) * (x.dim() - 2)).expand(x.shape[:-1]).reshape(-1)
