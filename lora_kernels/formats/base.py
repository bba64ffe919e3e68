"""The interface of a storage format, and the registry of formats."""

from __future__ import annotations

from typing import Protocol

import torch

from lora_kernels.errors import ShapeError


class WeightFormat(Protocol):
    """One way to store W (N, K)."""

    name: str

    def matches(self, W: torch.Tensor) -> bool:
        """Whether W is stored this way."""

    def shape(self, W: torch.Tensor) -> tuple[int, int]:
        """(N, K) of the matrix that W represents."""

    def dense(self, W: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """W as a plain (N, K) tensor of ``dtype``; W itself if it already is one."""

    def nbytes(self, N: int, K: int, dtype: torch.dtype) -> int:
        """Bytes read when the whole of W is read once."""


_FORMATS: dict[str, WeightFormat] = {}


def register(fmt: WeightFormat) -> WeightFormat:
    """Add ``fmt`` to the registry, which tests, benchmarks and the command line iterate over."""
    _FORMATS[fmt.name] = fmt
    return fmt


def format_of(W: torch.Tensor) -> WeightFormat:
    """The format in which W is stored.

    Raises:
        ShapeError: W is in no registered format.
    """
    for fmt in _FORMATS.values():
        if fmt.matches(W):
            return fmt
    raise ShapeError(
        f"the base weight is {type(W).__name__} of {W.dtype} and shape {tuple(W.shape)}; accepted is a 2-D tensor in "
        f"one of the formats {sorted(_FORMATS)}; dequantize it first"
    )
