"""Disassembling many kernels in one run counts what a run for each counts."""

import struct
import subprocess
from collections import Counter
from types import SimpleNamespace

import pytest

from lora_kernels.check.compile import sass


def _elf(*sections: tuple[bytes, bytes]) -> bytes:
    """A 64-bit ELF file of named sections and the section of their names."""
    names, offsets, body = b"\0", [], b""
    for name, content in sections:
        offsets.append((len(names), 64 + len(body), len(content)))
        names, body = names + name + b"\0", body + content
    offsets.append((0, 64 + len(body), len(names)))
    headers = b"".join(struct.pack("<IIQQQQ24x", at, 1, 0, 0, start, size) for at, start, size in offsets)
    head = struct.pack("<40xQ12xHH", 64 + len(body) + len(names), len(offsets), len(offsets) - 1)
    return head + body + names + headers


def test_the_code_of_a_binary_is_its_text_sections() -> None:
    cubin = _elf((b".text.kernel", b"A" * 32), (b".nv.info", b"B" * 8), (b".text.helper", b"C" * 16))
    assert sass.machine_code(cubin) == b"A" * 32 + b"C" * 16


def test_instructions_are_counted_for_the_kernel_they_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = """\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, [R2.64] ;
        /*0020*/             @!UP1 HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/                   EXIT ;
"""
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, listing, "")

    monkeypatch.setattr(sass, "subprocess", SimpleNamespace(run=run))
    first, second = sass.opcodes(90, [bytes(32), bytes(32)])
    assert first == Counter({"LDC": 1, "LDG.E.128": 1})
    assert second == Counter({"HGMMA.64x16x16.F32.BF16": 1, "EXIT": 1})
    assert [command[1:3] for command in asked] == [["--binary", "SM90a"]]


def test_as_many_runs_as_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(sass, "_opcodes", lambda _, codes: sizes.append(len(codes)) or [Counter() for _ in codes])
    assert len(sass.opcodes(80, [b""] * 600)) == 600
    assert sizes == [256, 256, 88]
