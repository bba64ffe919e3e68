"""What a compiled kernel takes of a GPU, read from its binary, and whether it may ship."""

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from triton import knobs
from triton.backends.compiler import GPUTarget

from lora_kernels.check.compile.occupancy import Occupancy, occupancy
from lora_kernels.check.compile.sass import machine_code, opcodes
from lora_kernels.check.compile.ttir_lint import copies_by_descriptor, dot_loops, dots, narrow_offsets

MATRIX_UNITS = ("HGMMA", "UTCMMA", "HMMA", "MFMA")
_WIDE_MATRIX_UNIT = {"sm_90": "HGMMA", "sm_100": "UTCMMA"}  # for tiles of 64 rows and more

_SASS_COUNTS = {
    "HGMMA": r"[HIQ]GMMA\b",
    "UTCMMA": r"UTC\w*MMA\b",
    "HMMA": r"[HIQO]MMA\b",
    "UTMALDG": r"UTMALDG\b",
    "LDGSTS": r"LDGSTS\b",
    "LDG128": r"LDG\b.*\.128\b",
    "USETMAXREG": r"USETMAXREG\b",
    "ATOMIC": r"(?:RED|ATOM)G?\b",
    "TRAP": r"BPT\.TRAP\b",
    "SPILL": r"(?:STL|LDL)\b",
    "all": r"",
}
_AMDGCN_COUNTS = {
    "MFMA": r"\bv_mfma",
    "LOAD128": r"(?:global|buffer)_load_dwordx4",
    "ATOMIC": r"_atomic_",
    "TRAP": r"\bs_trap",
    "all": r"(?m)^\s+[sv]_",
}


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
    """One kernel compiled for one chip.

    ``num_warps``: of a block, all warp-specialised partitions. ``shared``: bytes a block. ``ir``: Triton's own, of the
    first stage it keeps: ttir, or ttgir of a Gluon kernel. ``rings``: bytes of tiles in several stages, part of shared.
    ``tensor``: columns of tensor memory. ``seconds``: of compilation, 0 from the cache. ``code``: of Triton's hash.
    """

    name: str
    chip: Chip
    num_warps: int
    num_stages: int
    shared: int
    resources: Resources
    ir: str = field(repr=False)
    rings: int = 0
    tensor: int = 0
    seconds: float = 0.0
    code: str = ""

    @property
    def matrix(self) -> dict[str, int]:
        """Instructions of each matrix unit it uses."""
        counts = self.resources.instructions
        return {unit: counts[unit] for unit in MATRIX_UNITS if counts.get(unit)}

    @property
    def occupancy(self) -> Occupancy:
        """Blocks and warps of it on one multiprocessor."""
        return occupancy(self.chip.arch, self.resources.registers, self.shared, self.num_warps, self.tensor)

    def faults(self) -> list[str]:
        """Why this kernel must not ship; empty where it may."""
        found, counts = [], self.resources.instructions
        if self.resources.spills:
            found.append(f"{self.resources.spills} spill instructions")
        if self.resources.stack:
            found.append(f"{self.resources.stack} bytes of stack")
        if self.shared > self.chip.shared:
            found.append(f"shared memory {self.shared} of {self.chip.shared} bytes")
        matrix_dots = [dot for dot in dots(self.ir) if dot.on_matrix_unit]
        wide = _WIDE_MATRIX_UNIT.get(self.chip.arch)
        if counts["TRAP"] and counts["all"] < 64:
            found.append("compiled to a lone trap")
        elif matrix_dots and not self.matrix:
            found.append("no matrix instruction")
        elif wide and any(dot.M >= 64 and dot.dtype != "f32" for dot in matrix_dots) and not counts[wide]:
            found.append(f"no {wide}")
        if self.chip.arch.startswith("sm_"):
            found += self._lost_copies()
        if "ttg.warp_specialize" in self.ir and not counts.get("USETMAXREG"):
            found.append("no USETMAXREG: its partitions share out no registers")
        return found + [f"32-bit offset {line}" for line in narrow_offsets(self.ir)]

    def _lost_copies(self) -> list[str]:
        """What says that a K loop waits for its loads instead of having them under way some stages ahead."""
        found, counts = [], self.resources.instructions
        loops = [((loop.stages or self.num_stages) - 1, loop) for loop in dot_loops(self.ir)]
        ahead = max((turns * (loop.by_pointer + loop.by_descriptor) for turns, loop in loops), default=0)
        rings = sum(turns * loop.by_descriptor for turns, loop in loops)
        if self.shared < ahead:
            found.append(f"pipelining lost: {self.shared} bytes of shared memory, its loop has {ahead} under way")
        elif self.rings < rings:
            found.append(f"pipelining lost: {self.rings} bytes of rings, its loops have {rings} under way")
        if any(turns and loop.by_pointer for turns, loop in loops) and not counts["LDGSTS"]:
            found.append("no LDGSTS: its loop waits for every load")
        if copies_by_descriptor(self.ir) and int(self.chip.arch.removeprefix("sm_")) >= 90 and not counts["UTMALDG"]:
            found.append("no UTMALDG")
        return found


def read_resources(target: GPUTarget, kernels: Sequence[Mapping[str, Path]]) -> list[Resources]:
    """Registers, spills, stack and instruction counts of compiled kernels, from the files of each by their suffix."""
    if target.backend == "hip":
        return [_read_amd(files["amdgcn"].read_text()) for files in kernels]
    listings = opcodes(target.arch, [machine_code(files["cubin"].read_bytes()) for files in kernels])
    read = []
    for files, listing in zip(kernels, listings, strict=True):
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(files["cubin"])]
        usage = dict(re.findall(r"(\w+):(\d+)", subprocess.run(command, capture_output=True, text=True).stdout))
        counts = {
            name: sum(count for opcode, count in listing.items() if re.match(pattern, opcode))
            for name, pattern in _SASS_COUNTS.items()
        }
        stack = int(usage["STACK"]) + int(usage["LOCAL"])
        read.append(Resources(int(usage["REG"]), counts.pop("SPILL"), stack, counts))
    return read


def _read_amd(assembly: str) -> Resources:
    def of(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", assembly)
        return int(match[1]) if match else 0

    counts = {name: len(re.findall(pattern, assembly)) for name, pattern in _AMDGCN_COUNTS.items()}
    return Resources(of("vgpr_count"), of("vgpr_spill_count"), of("private_segment_fixed_size"), counts)
