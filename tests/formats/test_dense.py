"""What counts as a dense weight, and what it costs to read."""

import pytest
import torch

from lora_kernels.errors import ShapeError
from lora_kernels.formats import DENSE, format_of


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_floating_matrices_are_dense(dtype):
    W = torch.zeros(3, 5, dtype=dtype)
    assert format_of(W) is DENSE
    assert DENSE.shape(W) == (3, 5)
    assert DENSE.nbytes(3, 5, dtype) == W.nbytes
    assert DENSE.dense(W, dtype) is W


@pytest.mark.parametrize("W", [torch.zeros(3), torch.zeros(3, 5, dtype=torch.int8), torch.zeros(2, 3, 5)])
def test_anything_else_is_refused_by_name(W):
    with pytest.raises(ShapeError, match=r"dense.*dequantize"):
        format_of(W)
