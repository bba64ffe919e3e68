"""What a compiled kernel takes of a GPU, read from its binary, and whether it may ship."""

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from triton import knobs
from triton.backends.compiler import GPUTarget

from lora_kernels.testing.ttir_lint import dots, narrow_offsets

_WIDE_MATRIX_UNIT = {"sm_90": "HGMMA", "sm_100": "UTCMMA"}  # for tiles of 64 rows and more

_SASS_COUNTS = {
    "HGMMA": r"\b[HIQ]GMMA",
    "UTCMMA": r"\bUTC\w*MMA",
    "HMMA": r"\b[HIQO]MMA",
    "UTMALDG": r"\bUTMALDG",
    "LDGSTS": r"\bLDGSTS",
    "LDG128": r"\bLDG\S*\.128",
    "ATOMIC": r"\b(?:RED|ATOM)G?\b",
    "TRAP": r"\bBPT\.TRAP",
    "all": r"/\*[0-9a-f]{4,5}\*/",
}
_AMDGCN_COUNTS = {
    "MFMA": r"\bv_mfma",
    "LOAD128": r"(?:global|buffer)_load_dwordx4",
    "ATOMIC": r"_atomic_",
    "TRAP": r"\bs_trap",
    "all": r"(?m)^\s+[sv]_",
}
_MATRIX_UNITS = ("HGMMA", "UTCMMA", "HMMA", "MFMA")


class Chip(Protocol):
    """The GPU to compile for: arch is sm_NN or gfxNNN, shared in bytes a block, units are multiprocessors."""

    @property
    def arch(self) -> str: ...
    @property
    def shared(self) -> int: ...
    @property
    def units(self) -> int: ...


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers a thread, instructions that touch spilled registers, bytes of stack."""

    registers: int
    spills: int
    stack: int
    instructions: dict[str, int]


@dataclass(frozen=True)
class Kernel:
    """One kernel compiled for one chip; shared memory in bytes a block, seconds of compilation (0 from the cache)."""

    name: str
    chip: Chip
    num_warps: int
    shared: int
    resources: Resources
    seconds: float
    ttir: str = field(repr=False)

    @property
    def matrix_instructions(self) -> int:
        return sum(self.resources.instructions.get(unit, 0) for unit in _MATRIX_UNITS)

    def faults(self) -> list[str]:
        """Why this kernel must not ship; empty where it may."""
        found, counts = [], self.resources.instructions
        if self.resources.spills:
            found.append(f"{self.resources.spills} spill instructions")
        if self.resources.stack:
            found.append(f"{self.resources.stack} bytes of stack")
        if self.shared > self.chip.shared:
            found.append(f"shared memory {self.shared} of {self.chip.shared} bytes")
        matrix_dots = [dot for dot in dots(self.ttir) if dot.on_matrix_unit]
        wide = _WIDE_MATRIX_UNIT.get(self.chip.arch)
        if counts["TRAP"] and counts["all"] < 64:
            found.append("compiled to a lone trap")
        elif matrix_dots and not self.matrix_instructions:
            found.append("no matrix instruction")
        elif wide and any(dot.M >= 64 and dot.dtype != "f32" for dot in matrix_dots) and not counts[wide]:
            found.append(f"no {wide}")
        return found + [f"32-bit offset {line}" for line in narrow_offsets(self.ttir)]


def read_resources(target: GPUTarget, files: dict[str, Path]) -> Resources:
    """Registers, spills, stack and instruction counts of a compiled kernel's binary or assembly."""
    if target.backend == "hip":
        assembly = files["amdgcn"].read_text()

        def of_amd(key: str) -> int:
            match = re.search(rf"\.{key}:\s+(\d+)", assembly)
            return int(match[1]) if match else 0

        counts = {name: len(re.findall(pattern, assembly)) for name, pattern in _AMDGCN_COUNTS.items()}
        return Resources(of_amd("vgpr_count"), of_amd("vgpr_spill_count"), of_amd("private_segment_fixed_size"), counts)

    def cuobjdump(option: str) -> str:
        command = [knobs.nvidia.cuobjdump.path, option, str(files["cubin"])]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage, sass = cuobjdump("-res-usage"), cuobjdump("-sass")

    def of_nvidia(key: str) -> int:
        match = re.search(rf"{key}:(\d+)", usage)
        return int(match[1]) if match else 0

    counts = {name: len(re.findall(pattern, sass)) for name, pattern in _SASS_COUNTS.items()}
    spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    return Resources(of_nvidia("REG"), spills, of_nvidia("STACK") + of_nvidia("LOCAL"), counts)
