"""Weights that were created under torch.inference_mode, in a form that autograd can save."""

from __future__ import annotations

import torch
from torch import Tensor


def savable(W: Tensor) -> Tensor:
    """W itself, or where it is an inference tensor another tensor over the same memory that is none."""
    if not W.is_inference():
        return W
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty(0, dtype=W.dtype, device=W.device).set_(
            W.untyped_storage(), W.storage_offset(), W.shape, W.stride()
        )
