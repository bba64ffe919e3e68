"""Tiles of the Gluon kernels: every default is valid, what cannot run is refused with a reason."""

import itertools
from dataclasses import replace

import pytest
import torch

from lora_kernels.kernels.chip import CHIPS
from lora_kernels.kernels.hopper.gluon_tiles import GluonConfig, gluon_config, gluon_shared_bytes, refusal

H100 = CHIPS["sm_90"]
WIDE = gluon_config(8192, 4096, 16, torch.bfloat16, H100)


def test_every_default_is_valid():
    for M, N, r in itertools.product((1, 128, 1000, 8192), (8, 256, 4096), (1, 16, 17, 64)):
        config = gluon_config(M, N, r, torch.bfloat16, H100)
        assert refusal(config, torch.bfloat16, r, H100) is None
        assert (256 if -(-M // 128) * -(-N // 256) >= 132 else 128) == config.BLOCK_N


def test_the_ring_fills_the_shared_memory():
    """A slot more would not fit, in any tile."""
    for M, N in ((8192, 4096), (8192, 128), (64, 4096)):
        config = gluon_config(M, N, 16, torch.bfloat16, H100)
        assert gluon_shared_bytes(config, torch.bfloat16) <= H100.shared
        assert "shared memory" in refusal(replace(config, STAGES=config.STAGES + 1), torch.bfloat16, 16, H100)


@pytest.mark.parametrize(
    ("config", "dtype", "r", "arch", "why"),
    [
        (WIDE, torch.bfloat16, 16, "sm_80", "sm_90 alone"),
        (WIDE, torch.bfloat16, 16, "sm_100", "sm_90 alone"),
        (WIDE, torch.bfloat16, 16, "gfx942", "sm_90 alone"),
        (WIDE, torch.float32, 16, "sm_90", "16-bit"),
        (WIDE, torch.float16, 16, "sm_90", "keeps them in float32; pointer kernels"),
        (WIDE, torch.bfloat16, 65, "sm_90", "above 64"),
        (GluonConfig(64, 128, 64, num_warps=8, STAGES=3), torch.bfloat16, 16, "sm_90", "64 rows"),
        (GluonConfig(128, 64, 64, num_warps=8, STAGES=3), torch.bfloat16, 16, "sm_90", "64 columns"),
        (GluonConfig(128, 128, 32, num_warps=8, STAGES=3), torch.bfloat16, 16, "sm_90", "128 bytes"),
        (GluonConfig(128, 512, 64, num_warps=8, STAGES=2), torch.bfloat16, 16, "sm_90", "128 bytes"),
    ],
)
def test_refusals_say_why(config, dtype, r, arch, why):
    assert why in refusal(config, dtype, r, CHIPS[arch])
