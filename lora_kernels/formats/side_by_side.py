"""Weights that are adjacent in one buffer: each layer has its own matrix, and one product can read all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def as_one(W: Sequence[Tensor]) -> Tensor | None:
    """(sum of N_p, K) if the contiguous W_p (N_p, K) are adjacent in one buffer, in order; otherwise None."""
    first = W[0]
    storage, offset, K = first.untyped_storage().data_ptr(), first.storage_offset(), first.shape[1]
    for w in W:
        if w.storage_offset() != offset or not w.is_contiguous() or w.untyped_storage().data_ptr() != storage:
            return None
        offset += w.numel()
    rows = sum(w.shape[0] for w in W)
    return first.as_strided((rows, K), (K, 1), first.storage_offset())


def put_side_by_side(W: Sequence[nn.Parameter]) -> None:
    """Move the W_p (N_p, K) into one buffer, each a view of its part. The Parameter objects stay the same.

    During the copy the weights exist twice. Nothing is moved if they are already adjacent, if two of them are the same
    Parameter, or if one is not a plain Parameter (as in a sharded model).
    """
    if any(type(w) is not nn.Parameter for w in W) or len({id(w) for w in W}) < len(W) or as_one(W) is not None:
        return
    with torch.inference_mode(False), torch.no_grad():
        buffer = torch.cat([w.detach() for w in W])
        for w, part in zip(W, buffer.split([w.shape[0] for w in W]), strict=True):
            w.data = part
