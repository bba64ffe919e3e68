"""Which findings keep a kernel from shipping."""

from dataclasses import replace

import pytest

from lora_kernels.kernels.chip import CHIPS
from lora_kernels.testing.resources import Kernel, Resources

CLEAN = Resources(registers=128, spills=0, stack=0, instructions={"HGMMA": 8, "HMMA": 0, "TRAP": 0, "all": 900})
DOT = "%acc = tt.dot %x, %w, %zero : tensor<128x64xbf16> * tensor<64x128xbf16> -> tensor<128x128xf32>"
KERNEL = Kernel("kernel", CHIPS["sm_90"], num_warps=8, shared=100_000, resources=CLEAN, seconds=1.0, ttir=DOT)


def _with(**instructions: int) -> Kernel:
    return replace(KERNEL, resources=replace(CLEAN, instructions=CLEAN.instructions | instructions))


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        (replace(KERNEL, resources=replace(CLEAN, spills=3)), "3 spill instructions"),
        (replace(KERNEL, resources=replace(CLEAN, stack=8)), "8 bytes of stack"),
        (replace(KERNEL, shared=240_000), "shared memory 240000 of 232448 bytes"),
        (_with(HGMMA=0), "no matrix instruction"),
        (_with(HGMMA=0, HMMA=8), "no HGMMA"),
        (_with(HGMMA=0, TRAP=1, all=12), "compiled to a lone trap"),
    ],
)
def test_faults(kernel: Kernel, fault: str) -> None:
    assert kernel.faults() == [fault]


def test_no_matrix_unit_is_asked_of_fp32_or_of_a_kernel_without_products() -> None:
    assert KERNEL.faults() == []
    assert replace(_with(HGMMA=0), ttir=DOT.replace("bf16", "f32")).faults() == []
    assert replace(_with(HGMMA=0), ttir="").faults() == []


def test_few_rows_may_use_the_older_unit() -> None:
    assert replace(_with(HGMMA=0, HMMA=8), ttir=DOT.replace("<128x64xbf16>", "<16x64xbf16>")).faults() == []
