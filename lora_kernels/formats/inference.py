"""Makes weights that were created under torch.inference_mode usable for autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def savable(W: Tensor) -> Tensor:
    """W, or if W is an inference tensor, a normal tensor on the same memory, which autograd can save."""
    if not W.is_inference():
        return W
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty(0, dtype=W.dtype, device=W.device).set_(
            W.untyped_storage(), W.storage_offset(), W.shape, W.stride()
        )
