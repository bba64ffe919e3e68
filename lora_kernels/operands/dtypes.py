"""The dtype of a layer's low-rank intermediates, in the reference and in the kernels."""

from __future__ import annotations

import torch


def low_rank_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of XA and dYB (M, r), and of A and B when they are multiplied, in a layer whose X is ``dtype``.

    float32 for float16, whose range is too small: dYB is about dY times B, 1e-10 early in training, and XA grows with
    scaling and A. PEFT also computes a float32 adapter over a float16 base in float32. For every other dtype the
    result is ``dtype``.
    """
    return torch.float32 if dtype is torch.float16 else dtype
