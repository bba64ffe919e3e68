"""Blocks a multiprocessor holds, against figures worked out by hand from NVIDIA's tables."""

import pytest

from lora_kernels.check.compile.occupancy import KIB, LIMITS, Occupancy, occupancy
from lora_kernels.kernels.chip import CHIPS


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "expected"),
    [
        # 168 registers: 3 warps a scheduler, 12 in all: one block of 8
        ("sm_90", 168, 180 * KIB, 8, Occupancy(1, 8, "registers")),
        ("sm_90", 128, 96 * KIB, 8, Occupancy(2, 16, "registers")),  # 4 warps a scheduler
        ("sm_90", 129, 60 * KIB, 4, Occupancy(3, 12, "registers")),  # rounded up to 136
        ("sm_90", 32, 100 * KIB, 4, Occupancy(2, 8, "shared")),
        ("sm_90", 32, 113 * KIB, 4, Occupancy(2, 8, "shared")),  # with 1 KiB of the system's own: 2 x 114 of 228
        ("sm_90", 32, 114 * KIB, 4, Occupancy(1, 4, "shared")),
        ("sm_80", 32, 0, 4, Occupancy(16, 64, "registers")),
        ("sm_86", 32, 0, 4, Occupancy(12, 48, "warps")),
        ("sm_86", 16, 0, 1, Occupancy(16, 16, "blocks")),
        ("sm_80", 255, 0, 12, Occupancy(0, 0, "registers")),  # 2 warps a scheduler
        ("gfx942", 128, 32 * KIB, 4, Occupancy(2, 8, "shared")),
        ("gfx942", 256, 0, 8, Occupancy(1, 8, "registers")),
    ],
)
def test_by_hand(arch: str, registers: int, shared: int, warps: int, expected: Occupancy) -> None:
    assert occupancy(arch, registers, shared, warps) == expected


def test_tensor_memory_admits_one_block_that_takes_all_of_it() -> None:
    assert occupancy("sm_100", 32, 0, 4, tensor=512) == Occupancy(1, 4, "tensor")
    assert occupancy("sm_100", 32, 0, 4, tensor=128).blocks == 4


def test_every_chip_has_its_limits_and_one_block_may_take_what_the_chip_allows() -> None:
    assert LIMITS.keys() == CHIPS.keys()
    for arch, chip in CHIPS.items():
        assert occupancy(arch, 64, chip.shared, 4).blocks == 1
