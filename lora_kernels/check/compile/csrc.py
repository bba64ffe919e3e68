"""The compile matrix's rows of csrc/: the CUDA C++ kernels as nvcc compiles them for each architecture.

They are compiled from the source tree, apart from the module that setup.py may have built. Without nvcc, or without the
sources (an installed wheel has none), there are no rows, and the reason is told.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lora_kernels.check.compile.matrix import Row
from lora_kernels.check.compile.occupancy import occupancy
from lora_kernels.kernels.chip import CHIPS
from lora_kernels.planning import cost, multi_cost

KERNEL = "multi_decode_cuda"
SOURCES = Path(__file__).parents[3] / "csrc"
# nvcc's target for an architecture of the matrix, and the copies that its ring is made of
TARGETS = {"sm_80": "80", "sm_86": "80", "sm_89": "80", "sm_90": "90a", "sm_100": "100", "sm_120": "120"}
RINGS = {"Async": "LDGSTS", "Bulk": "UBLKCP"}
DTYPES = {"Bfloat16": torch.bfloat16, "Half": torch.float16}
N = K = 4096  # of the launch that the cost model is asked about: one adapter of rank R
R = 16
# decode_args.h: rows of W and columns a stage, stages at most, what stands before the stages
ROWS, BLOCK_K, MAX_STAGES, HEAD = 64, 128, 8, 1792

_NAME = re.compile(r"decode_kernelIN3gpu\d+(Bfloat16|Half)ENS_\d+(Async|Bulk)RingELi(\d+)E")
_LINE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_COUNTS = {
    "HMMA": r"HMMA\b",
    "LDGSTS": r"LDGSTS\b",
    "UBLKCP": r"UBLKCP\b",
    "ATOMIC": r"(?:RED|ATOM)G?\b",
    "SPILL": r"(?:STL|LDL)\b",
    "all": r"",
}


def why_none() -> str | None:
    """Why there are no rows, or None."""
    if shutil.which("nvcc") is None:
        return "no nvcc in PATH"
    return None if (SOURCES / "multi_lora_decode.cu").is_file() else f"no sources in {SOURCES}"


def csrc_rows(
    archs: Sequence[str], dtypes: Sequence[str] = (), kernels: Sequence[str] = (), jobs: int = 1
) -> list[Row]:
    """A row for every kernel of csrc/ of ``archs`` and ``dtypes``; none where ``kernels`` names others.

    Raises:
        RuntimeError: nvcc refused; what it said.
    """
    if kernels and KERNEL not in kernels:
        return []
    wanted = [arch for arch in archs if arch in TARGETS]
    targets = sorted({TARGETS[arch] for arch in wanted})
    with ThreadPoolExecutor(max(1, min(jobs, os.cpu_count() or 1))) as pool:
        compiled = dict(zip(targets, pool.map(compile_for, targets), strict=True))
    rows = [_row(arch, found) for arch in wanted for found in compiled[TARGETS[arch]]]
    return [row for row in rows if not dtypes or row.dtype in dtypes]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One kernel of a cubin: its dtype, ring ("Async", "Bulk") and tokens, and what it takes."""

    dtype: torch.dtype
    ring: str
    tokens: int
    registers: int
    stack: int
    counts: dict[str, int]


def compile_for(target: str) -> list[Compiled]:
    """The kernels for sm_``target``; of the two rings that which the architecture has.

    Raises:
        RuntimeError: nvcc refused; what it said.
    """
    from triton import knobs  # has the disassembler, which CUDA's compiler packages leave out

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "csrc.cubin"
        command = ["nvcc", "-std=c++20", "-O3", f"-I{SOURCES}/include", "-cubin", "-o", str(cubin)]
        command += [f"-gencode=arch=compute_{target},code=sm_{target}", str(SOURCES / "multi_lora_decode.cu")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc refused csrc/ for sm_{target}:\n{done.stderr[-2000:]}")
        tool = knobs.nvidia.cuobjdump.path
        usage, listing = (
            subprocess.run([tool, option, str(cubin)], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    code = {name: text for name, _, text in (part.partition("\n") for part in listing.split("Function : ")[1:])}
    found = []
    for name, numbers in re.findall(r"Function (\w+):\s*\n\s*(REG:.*)", usage):
        match = _NAME.search(name)
        opcodes = Counter(_LINE.findall(code.get(name, "")))
        counts = {unit: sum(n for op, n in opcodes.items() if re.match(form, op)) for unit, form in _COUNTS.items()}
        if match and counts["all"] > 64:  # the other ring's is empty
            values = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
            stack = values["STACK"] + values["LOCAL"]
            dtype, tokens = DTYPES[match[1]], int(match[3])
            found.append(Compiled(dtype, match[2], tokens, values["REG"], stack, counts))
    return found


def stage_bytes(tokens: int) -> int:
    """Shared memory of a stage: 64 more bytes every two rows, decode_args.h's row_offset."""
    return (ROWS + tokens) // 2 * (4 * BLOCK_K + 64)


def stages_of(tokens: int, shared: int) -> int:
    """Stages that a block of ``shared`` bytes has room for, as launch_decode counts them."""
    return min((shared - HEAD - tokens * (ROWS + 4) * 4) // stage_bytes(tokens), MAX_STAGES)


def _row(arch: str, found: Compiled) -> Row:
    chip, tokens = CHIPS[arch], found.tokens
    stages = stages_of(tokens, chip.shared)
    shared = HEAD + tokens * (ROWS + 4) * 4 + stages * stage_bytes(tokens)
    warps = 8 + (found.ring == "Bulk")
    fits = occupancy(arch, found.registers, shared, warps)
    counts = dict(found.counts)
    spills = counts.pop("SPILL")
    faults = [f"{spills} spill instructions"] if spills else []
    faults += [f"{found.stack} bytes of stack"] if found.stack else []
    faults += ["fewer than two stages"] if stages < 2 else []
    faults += ["no block fits"] if fits.blocks < 1 else []
    faults += [f"no {unit}" for unit in ("HMMA", RINGS[found.ring]) if not counts[unit]]
    launch = multi_cost.decode(multi_cost.MultiCallShape("fwd", tokens, N, K, 1, R, found.dtype))
    seconds = cost.seconds(launch, found.dtype, chip)
    return Row(
        arch, KERNEL, f"M<={tokens} r={R}", str(found.dtype).removeprefix("torch."),
        f"{ROWS}x{tokens}x{BLOCK_K} w{warps} s{stages}", tokens, N, K, R,
        registers=found.registers, spills=spills, stack=found.stack, shared=shared,
        blocks=fits.blocks, warps=fits.warps, limit=fits.limit, instructions=counts,
        flop=launch.flop, moved=launch.bytes, seconds=seconds,
        bound="launch" if seconds < 2 * cost.LAUNCH_SECONDS else "memory", faults=tuple(faults),
    )  # fmt: skip
