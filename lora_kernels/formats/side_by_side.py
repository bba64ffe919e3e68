"""Weights that follow one another in one buffer: several matrices to their layers, one matrix to a product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def as_one(W: Sequence[Tensor]) -> Tensor | None:
    """(sum of N_p, K) where the contiguous W_p (N_p, K) follow one another in one buffer; None where they do not."""
    first = W[0]
    storage, offset, K = first.untyped_storage().data_ptr(), first.storage_offset(), first.shape[1]
    for w in W:
        if w.storage_offset() != offset or not w.is_contiguous() or w.untyped_storage().data_ptr() != storage:
            return None
        offset += w.numel()
    rows = sum(w.shape[0] for w in W)
    return first.as_strided((rows, K), (K, 1), first.storage_offset())


def put_side_by_side(W: Sequence[nn.Parameter]) -> None:
    """Move the W_p (N_p, K) into one buffer, each a view of its own part; whoever holds a Parameter keeps it.

    While it is filled the weights exist twice. Parameters that lie so already, or of which two are one, stay; so do
    those that are no plain tensors, such as the pieces of a sharded model.
    """
    if any(type(w) is not nn.Parameter for w in W) or len({id(w) for w in W}) < len(W) or as_one(W) is not None:
        return
    with torch.inference_mode(False), torch.no_grad():
        buffer = torch.cat([w.detach() for w in W])
        for w, part in zip(W, buffer.split([w.shape[0] for w in W]), strict=True):
            w.data = part
