"""adapter_names on a fused PEFT layer: a batch of several adapters by the operator of mixed batches.

    y[i] = x[i] W^T + bias + scaling_l x[i] A_l^T B_l^T        l the adapter that adapter_names[i] names, or none

PEFT takes the rows of one adapter after another out of the batch and puts them back. Here the adapters of the batch are
laid side by side for each call; lora_kernels.AdapterPool holds them so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.autograd.multi_lora_linear import multi_lora_linear_unchecked
from lora_kernels.operands.slots import BASE, Slots

Part = tuple[Tensor, Tensor, Tensor | None, float, float]  # A (r, K), B (N, r), lora_bias, scaling, dropout's p

_ids: tuple[tuple[Any, ...], Tensor] | None = None


def mixed_forward(
    layer: Any,
    x: Tensor,
    names: Sequence[str],
    W: Tensor,
    bias: Tensor | None,
    adapter: Callable[[Any, str, torch.dtype], Part | str],
) -> Tensor | str:
    """y (..., N) for x (batch, ..., K) and one name for each of its batch, or the reason why PEFT's own forward runs.

    ``adapter``: what reads one adapter of the layer.
    """
    held = layer._modules["lora_A"]._modules
    there = [name for name in dict.fromkeys(names) if name != BASE and name in held]
    parts = []
    for name in there:
        if name in layer.lora_variant:
            return f"{type(layer.lora_variant[name]).__name__} in a batch of several adapters"
        part = adapter(layer, name, x.dtype)
        if isinstance(part, str):
            return part
        if part[2] is not None or part[4] > 0.0:
            return "lora_bias or dropout in a batch of several adapters"
        parts.append(part)
    if not parts:
        return "no adapter of the batch is on it"
    A, B, _, scalings, _ = zip(*parts, strict=True)
    slots = Slots.of(A, B, None, scalings)  # at every call: weights change in ways that no tensor counts (.data)
    return multi_lora_linear_unchecked(x, W, slots, _ids_of(names, there, x), bias)


def _ids_of(names: Sequence[str], there: list[str], x: Tensor) -> Tensor:
    """int32 (M,), the slot of each row of x; the same tensor for every layer of a model."""
    global _ids
    if torch.compiler.is_compiling():
        return _made(names, there, x)
    key = (tuple(names), tuple(there), x.shape[:-1], x.device)
    last = _ids  # read once: another thread may put its own batch there at any time
    if last is None or last[0] != key:
        with torch.inference_mode(False):  # a forward with gradients may be next
            last = _ids = key, _made(names, there, x)
    return last[1]


def _made(names: Sequence[str], there: list[str], x: Tensor) -> Tensor:
    slot = {name: number for number, name in enumerate(there)}
    ids = torch.tensor([slot.get(name, -1) for name in names], dtype=torch.int32, device="cpu").to(x.device)
    return ids.view(-1, *(1,) * (x.dim() - 2)).expand(x.shape[:-1]).reshape(-1)
