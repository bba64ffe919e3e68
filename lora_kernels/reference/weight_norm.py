"""The row norms that DoRA divides by, of W + s B A, without computing the whole matrix.

    norm_n^2 = |W_n|^2 + 2 s (W A^T)_n . B_n + s^2 B_n (A A^T) B_n^T

The first term is that of the base weight alone; the others cost one product of width r. If s B_n A nearly
cancels W_n, the three terms and their rounding errors are much larger than the sum. Such rows are found by comparing
the sum with its terms, and are then summed element by element in float64.
Source: Liu et al., DoRA, arXiv 2402.09353, equation 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

BLOCK = 1 << 20  # elements of W + s B A that exist at a time: 4 MiB in float32
CANCELLED = 0.25  # norm^2 over the sum of its positive terms; from here up cancellation costs two bits


def wide(*tensors: Tensor) -> torch.dtype:
    """The dtype of norms and scales: float32, or float64 if an operand is float64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def row_blocks(N: int, K: int, elements: int = BLOCK) -> Iterator[slice]:
    """Slices of consecutive rows of an (N, K) matrix, each of at most ``elements`` (one row at least)."""
    step = max(1, elements // max(1, K))
    return (slice(i, min(i + step, N)) for i in range(0, N, step))


def base_norm_sq(W: Tensor) -> Tensor:
    """|W_n|^2, float64 (N,), of W (N, K)."""
    return _by_blocks(W, lambda rows: torch.linalg.vector_norm(rows, dim=1)).double().square_()


def weight_norm(W: Tensor, A: Tensor, B: Tensor, scaling: float, W_sq: Tensor | None = None) -> Tensor:
    """The norms (N,) of W (N, K) + scaling * B (N, r) A (r, K) from the factored terms, in ``wide``'s dtype.

    ``W_sq``: base_norm_sq(W), if known. Reads a comparison on the host; float64 operands go through
    weight_norm_direct, since they leave nothing wider to be exact in.
    """
    if wide(W, A, B) == torch.float64:
        return weight_norm_direct(W, A, B, scaling)
    At, A64, B64 = A.float().t(), A.double(), B.double()
    cross = _by_blocks(W, lambda rows: rows @ At).double().mul_(B64).sum(1)
    positive = (B64 @ (A64 @ A64.t())).mul_(B64).sum(1).mul_(scaling * scaling)
    positive += base_norm_sq(W) if W_sq is None else W_sq
    norm_sq = torch.add(positive, cross, alpha=2 * scaling)
    rows = (norm_sq < CANCELLED * positive).nonzero().squeeze(1)
    for block in row_blocks(rows.shape[0], W.shape[1]):
        these = rows[block]
        norm_sq[these] = weight_norm_direct(W[these].double(), A64, B64[these], scaling).square_()
    return norm_sq.sqrt_().float()


def weight_norm_direct(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """The same norms, a block of rows of W + scaling * B A at a time; does not synchronize with the device."""
    dtype = wide(W, A, B)
    norm = W.new_empty(W.shape[0], dtype=dtype)
    A, B = A.to(dtype), B.to(dtype)
    for block in row_blocks(*W.shape):
        torch.linalg.vector_norm(torch.addmm(W[block].to(dtype), B[block], A, alpha=scaling), dim=1, out=norm[block])
    return norm


def _by_blocks(W: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """function(rows of W in float32) for all rows; 16-bit rows are cast block by block."""
    if W.dtype.itemsize >= 4:
        return function(W)
    return torch.cat([function(W[block].float()) for block in row_blocks(*W.shape)])
