"""Training memory beside the weights: gradients and optimizer state (computed), saved activations (measured)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora_kernels.finetune.train.batch import call_model


def state_bytes(model: nn.Module, trainable_only: bool = True) -> int:
    """Compute the bytes of gradients and AdamW's two moments: 3 values per parameter, in its dtype.

    trainable_only=False: as if every parameter were trained.
    """
    counted = [p for p in model.parameters() if p.requires_grad or not trainable_only]
    return sum(3 * p.numel() * p.element_size() for p in counted)


def saved_for_backward(model: nn.Module, inputs: Any) -> int:
    """Measure the bytes that a forward in training mode saves for its backward, without parameters and buffers.

    Uses autograd's saved-tensor hooks; storage shared by several saved tensors is counted once. The model, including
    its running statistics, is restored.
    """
    training, buffers = model.training, [(buffer, buffer.clone()) for buffer in model.buffers()]
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    try:
        with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = call_model(model, inputs)  # kept alive until all is counted, so that no address is reused
    finally:
        model.train(training)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    del outputs
    return sum(kept.values())
