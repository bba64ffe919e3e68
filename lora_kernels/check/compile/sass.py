"""Disassembly of NVIDIA binaries, many in one run: the disassembler starts in 0.3 s and then takes 10 ms a kernel."""

import re
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

from triton import knobs

_LINE = re.compile(r"/\*([0-9a-f]+)\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)")
_BATCH = 256  # kernels, about 20 MB of listing


def machine_code(cubin: bytes) -> bytes:
    """The instructions of a cubin, an ELF file: its .text sections one after another."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    count, names = struct.unpack_from("<HH", cubin, 0x3C)
    sections = [
        struct.unpack_from("<IIQQQQ", cubin, headers + 64 * i) for i in range(count)
    ]  # name at, .. offset, size
    strings = sections[names][4]
    return b"".join(
        cubin[offset : offset + size]
        for name, _, _, _, offset, size in sections
        if cubin[strings + name :].startswith(b".text")
    )


def opcodes(capability: int, codes: Sequence[bytes]) -> list[Counter[str]]:
    """How often each instruction, its modifiers included, stands in each of ``codes``, for sm_``capability``."""
    found: list[Counter[str]] = []
    for first in range(0, len(codes), _BATCH):
        found += _opcodes(capability, codes[first : first + _BATCH])
    return found


def _opcodes(capability: int, codes: Sequence[bytes]) -> list[Counter[str]]:
    counts: list[Counter[str]] = [Counter() for _ in codes]
    starts = list(accumulate((len(code) for code in codes), initial=0))
    arch = f"SM{capability}{'a' if capability >= 90 else ''}"  # Triton compiles for the architecture's own features
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "--binary", arch, file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for address, opcode in _LINE.findall(listing):
        counts[bisect_right(starts, int(address, 16)) - 1][opcode] += 1
    return counts
