"""Configurations: pure, valid on every chip, refused with a reason where they are not."""

import itertools

import pytest
import torch

from lora_kernels.kernels import tiles as tuning
from lora_kernels.kernels.chip import CHIPS
from lora_kernels.kernels.tiles import GemmConfig, SplitConfig

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS = (1, 15, 16, 17, 63, 64, 65, 128, 129, 1000, 8192, 100_000)


@pytest.mark.parametrize("arch", CHIPS)
def test_every_default_is_valid(arch):
    chip = CHIPS[arch]
    for M, N, r, dtype, dropout in itertools.product(ROWS, (1, 64, 4096), (1, 16, 64, 300), DTYPES, (False, True)):
        configs = (
            tuning.gemm_config(M, N, dtype, chip),
            tuning.one_pass_config(M, dtype, chip, dropout),
            tuning.shrink_config(M, dtype, chip, r, dropout),
            tuning.split_config(M, dtype, chip, r),
        )
        assert [tuning.is_valid(config, dtype, r, chip) for config in configs] == [None] * 4
        for config in configs:
            sizes = [v for k, v in vars(config).items() if k.startswith("BLOCK") or k == "num_warps"]
            assert all(v & (v - 1) == 0 for v in sizes)
            assert all(v >= 16 for k, v in vars(config).items() if k.startswith("BLOCK"))


def test_too_much_shared_memory_is_refused_with_the_bytes():
    config = GemmConfig(128, 128, 64, num_warps=8, num_stages=4)
    assert tuning.is_valid(config, torch.bfloat16, 16, CHIPS["sm_90"]) is None
    reason = tuning.is_valid(config, torch.bfloat16, 16, CHIPS["gfx942"])
    assert reason is not None
    assert "65536" in reason


def test_a_span_is_whole_tiles():
    assert "multiple" in str(tuning.is_valid(SplitConfig(64, 64, 100, 4, 1), torch.bfloat16, 16, CHIPS["sm_90"]))


@pytest.mark.parametrize(("r", "tile"), [(1, 16), (16, 16), (17, 32), (33, 64), (64, 64), (65, 64), (1000, 64)])
def test_rank_tiles(r, tile):
    assert tuning.rank_tile(r, torch.bfloat16) == tile
    assert tuning.rank_tile(r, torch.float32) == 16
