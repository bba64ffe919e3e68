"""What training needs beside the weights: computed for gradients and optimizer, measured for saved activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora_kernels.finetune.train.batch import call_model


def state_bytes(model: nn.Module, trainable_only: bool = True) -> int:
    """Bytes of gradients and AdamW's two moments, each in its parameter's dtype: 3 values a parameter.

    With ``trainable_only=False``: what they would be if every parameter were trained.
    """
    counted = [p for p in model.parameters() if p.requires_grad or not trainable_only]
    return sum(3 * p.numel() * p.element_size() for p in counted)


def saved_for_backward(model: nn.Module, inputs: Any) -> int:
    """Bytes that one forward in training mode keeps alive for its backward, parameters and buffers left out.

    Measured by autograd's own hooks; memory shared by several saved tensors is counted once. The model is left as it
    was, running statistics included.
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
            outputs = call_model(model, inputs)  # alive until all is counted, so that no address is used twice
    finally:
        model.train(training)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    del outputs
    return sum(kept.values())
