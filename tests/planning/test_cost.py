"""The cost model's arithmetic."""

import dataclasses

import pytest
import torch

from lora_kernels.kernels.chip import CHIPS
from lora_kernels.planning import cost
from lora_kernels.planning import plans as variants
from lora_kernels.planning.cost import CallShape, Launch

H100 = CHIPS["sm_90"]


def test_a_launch_costs_the_larger_of_arithmetic_and_memory_and_its_own_time():
    arithmetic = Launch("matmul", flop=10**12, bytes=1, maker="library")
    expected = 1e12 / (H100.tflops * 1e12 * cost.LIBRARY_EFFICIENCY)
    assert cost.seconds(arithmetic, torch.bfloat16, H100) == pytest.approx(expected + cost.LAUNCH_SECONDS)
    memory = Launch("shrink", flop=1, bytes=10**9)
    expected = 1e9 / (H100.gbps * 1e9 * cost.BANDWIDTH_EFFICIENCY)
    assert cost.seconds(memory, torch.bfloat16, H100) == pytest.approx(expected + cost.LAUNCH_SECONDS)


@pytest.mark.parametrize("op", ["fwd", "bwd"])
@pytest.mark.parametrize("name", ["eager", "shrink_extend"])
def test_arithmetic_is_that_of_the_mathematics(op, name):
    """Forward 2MN(K+r) + 2MKr, backward 2MK(N+r) + 4MNr + 2MKr: KERNELS of a LoRA layer, to the last FLOP."""
    M, N, K, r = 512, 384, 256, 16
    total = sum(x.flop for x in variants.launches(name, CallShape(op, M, N, K, r, torch.bfloat16)))
    if op == "fwd":
        assert total == 2 * M * N * (K + r) + 2 * M * K * r
    else:
        assert total == 2 * M * K * (N + r) + 4 * M * N * r + 2 * M * K * r


def test_fp32_without_tf32_runs_on_scalar_units():
    launch = Launch("matmul", flop=10**12, bytes=1, maker="library")
    assert cost.seconds(launch, torch.float32, H100) > 10 * cost.seconds(launch, torch.bfloat16, H100)


def test_partial_sums_are_written_by_one_kernel_and_read_by_the_next():
    M, N, K, r = 8192, 4096, 2048, 16
    q = CallShape("bwd", M, N, K, r, torch.bfloat16)
    small = 2 * r * (M + N + K)
    dyb_and_db, da = 4 * r * (M * 32 + N * 16), 4 * r * K * 64  # a block of 128 columns, a span of 512 rows; 128 rows
    assert cost.reduce(q).bytes == dyb_and_db + small
    assert cost.reduce_da(q).bytes == da + small
    assert cost.dyb_db(q).bytes == 2 * M * N + dyb_and_db + small
    assert cost.da(q).bytes == 2 * M * K + da + small
    assert cost.dx_da(q).bytes == 2 * (M * N + N * K + 2 * M * K) + da + small
    wide = dataclasses.replace(q, r=128)  # X is read for each tile of 64 ranks, and dX leaves dA alone
    assert cost.da(wide).bytes == 2 * 2 * M * K + 8 * da + 8 * small
    assert cost.dx_da(wide).bytes == 2 * (M * N + N * K + M * K) + 8 * small
