"""Tiles of the kernels for mixed batches: valid everywhere, and spans that cost little memory."""

import itertools

import pytest
import torch

from lora_kernels.kernels.chip import CHIPS
from lora_kernels.kernels.multi.tiles import (
    multi_expand_config,
    multi_extend_config,
    multi_grads_config,
    multi_shrink_config,
    multi_spans,
)
from lora_kernels.kernels.tiles import is_valid

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("arch", CHIPS)
def test_every_default_is_valid(arch):
    chip = CHIPS[arch]
    for M, N, r, dtype, wide in itertools.product(
        (1, 16, 64, 65, 1000, 8192), (8, 256, 4096), (0, 1, 16, 17, 64, 150), DTYPES, (True, False)
    ):
        for config in (
            multi_shrink_config(M, dtype, chip, r, wide),
            multi_extend_config(M, N, dtype, chip, r, wide),
            multi_expand_config(M, N, dtype, chip, r, wide),
            multi_grads_config(M, dtype, chip, r),
        ):
            assert is_valid(config, dtype, r, chip) is None, config


def test_spans_fill_the_chip_and_no_more():
    chip = CHIPS["sm_90"]
    assert multi_spans(8192, 4096, 4096, 128, chip) == 4  # 64 column blocks: 4 programs for each of 66 multiprocessors
    assert multi_spans(8192, 14336, 4096, 128, chip) == 1
    assert multi_spans(255, 128, 128, 8, chip) == 1
    assert multi_spans(0, 1, 1, 0, chip) == 1
    for M, R in itertools.product((1, 500, 8192, 100_000), (0, 1, 64, 4096)):
        spans = multi_spans(M, 1024, 1024, R, chip)
        assert spans == 1 or 8 * spans * R * 2048 <= 2 * M * 2048 // 4
        assert spans == 1 or (spans - 1) * 256 < M
