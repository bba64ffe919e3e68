"""The dense format: W is a 2-D floating-point tensor."""

from __future__ import annotations

import torch


class Dense:
    """W (N, K) in a floating-point dtype, any strides."""

    name = "dense"

    def matches(self, W: torch.Tensor) -> bool:
        return W.dim() == 2 and W.is_floating_point() and W.dtype.itemsize >= 2

    def shape(self, W: torch.Tensor) -> tuple[int, int]:
        return W.shape[0], W.shape[1]

    def dense(self, W: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return W if W.dtype == dtype else W.to(dtype)

    def nbytes(self, N: int, K: int, dtype: torch.dtype) -> int:
        return N * K * dtype.itemsize
