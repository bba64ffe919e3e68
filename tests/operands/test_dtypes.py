"""Which dtype the low-rank intermediates have."""

import pytest
import torch

from lora_kernels.operands.dtypes import low_rank_dtype


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_only_float16_is_widened(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert low_rank_dtype(dtype) is expected
