"""What a kernel needs to know of a GPU: limits that decide validity, rates that decide plans. No list of GPU names."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

KIB = 1024


@dataclass(frozen=True)
class Chip:
    """One GPU as the tuner and the cost model see it.

    ``arch``: sm_NN or gfxNNN. ``shared``: bytes of shared memory one block may use. ``units``: multiprocessors.
    ``tflops``: dense 16-bit matrix rate with fp32 accumulation; ``fp32_tflops``: fp32 without TF32; ``gbps``: memory.
    ``name``: what the driver calls the GPU, the key of its tuned table; empty for one that is not here.
    """

    arch: str
    shared: int
    units: int
    tflops: float
    fp32_tflops: float
    gbps: float
    name: str = ""

    @property
    def is_amd(self) -> bool:
        return self.arch.startswith("gfx")


# Vendor data sheets; the architectures of the compile matrix, one representative GPU each.
CHIPS = {
    chip.arch: chip
    for chip in (
        Chip("sm_80", 163 * KIB, 108, 312, 19.5, 1555),
        Chip("sm_86", 99 * KIB, 84, 71, 35.6, 936),
        Chip("sm_89", 99 * KIB, 128, 165, 82.6, 1008),
        Chip("sm_90", 227 * KIB, 132, 989, 66.9, 3350),
        Chip("sm_100", 227 * KIB, 148, 2250, 80.0, 8000),
        Chip("sm_120", 99 * KIB, 170, 210, 105.0, 1792),
        Chip("gfx942", 64 * KIB, 304, 1307, 163.0, 5300),
    )
}

# 16-bit matrix operations and fp32 operations per multiprocessor and clock, by architecture
_PER_CLOCK = {"sm_80": (2048, 128), "sm_86": (512, 256), "sm_89": (512, 256), "sm_90": (4096, 256)}
_PER_CLOCK |= {"sm_100": (8192, 256), "sm_120": (512, 256), "gfx942": (2048, 256)}


@functools.cache
def chip_of(device_index: int) -> Chip:
    """The Chip of a CUDA or ROCm device, from what the driver reports of it."""
    props = torch.cuda.get_device_properties(device_index)
    if torch.version.hip:
        arch = props.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{props.major}{props.minor}"
    near = CHIPS.get(arch) or (CHIPS["sm_80"] if not arch.startswith("gfx") else CHIPS["gfx942"])
    shared = getattr(props, "shared_memory_per_block_optin", 0) or near.shared
    clock_hz = getattr(props, "clock_rate", 0) * 1e3
    matrix, scalar = _PER_CLOCK.get(arch, _PER_CLOCK[near.arch])
    rate = clock_hz * props.multi_processor_count / 1e12
    gbps = 2 * getattr(props, "memory_clock_rate", 0) * 1e3 * getattr(props, "memory_bus_width", 0) / 8 / 1e9
    return Chip(
        arch=arch,
        shared=shared,
        units=props.multi_processor_count,
        tflops=matrix * rate or near.tflops,
        fp32_tflops=scalar * rate or near.fp32_tflops,
        gbps=gbps or near.gbps,
        name=getattr(props, "name", ""),
    )
