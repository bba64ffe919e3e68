"""csrc/ as nvcc compiles it: registers, spills, instructions; and the shared memory that its launch counts on."""

import subprocess

import pytest
import torch

from lora_kernels.check.compile import csrc as compile_csrc
from lora_kernels.check.compile.csrc import Compiled, csrc_rows, stage_bytes, stages_of, why_none
from lora_kernels.kernels.chip import CHIPS

COUNTS = {"HMMA": 90, "LDGSTS": 0, "UBLKCP": 2, "ATOMIC": 5, "SPILL": 0, "all": 3000}
GOOD = Compiled(torch.bfloat16, "Bulk", 16, 168, 0, COUNTS)
NVCC = pytest.mark.skipif(why_none() is not None, reason=f"csrc/ cannot be compiled: {why_none()}")


def test_a_row_says_what_the_launch_takes(monkeypatch):
    monkeypatch.setattr(compile_csrc, "compile_for", lambda target: [GOOD])
    (row,) = csrc_rows(["sm_90", "gfx942"])
    assert (row.arch, row.kernel, row.dtype, row.tiles) == ("sm_90", "multi_decode_cuda", "bfloat16", "64x16x128 w9 s8")
    assert (row.registers, row.blocks, row.warps) == (168, 1, 9)
    assert row.shared <= CHIPS["sm_90"].shared
    assert row.faults == ()
    assert row.moved > 2 * 4096 * 4096
    assert csrc_rows(["sm_90"], ["float16"]) == csrc_rows(["sm_90"], (), ["extend"]) == []


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"stack": 8}, "8 bytes of stack"),
        ({"counts": {**COUNTS, "SPILL": 3}}, "3 spill instructions"),
        ({"counts": {**COUNTS, "HMMA": 0}}, "no HMMA"),
        ({"counts": {**COUNTS, "UBLKCP": 0}}, "no UBLKCP"),
        ({"registers": 240}, "no block fits"),
    ],
)
def test_what_must_not_ship(changed, fault, monkeypatch):
    found = compile_csrc.dataclasses.replace(GOOD, **changed)
    monkeypatch.setattr(compile_csrc, "compile_for", lambda target: [found])
    assert fault in csrc_rows(["sm_90"])[0].faults


def test_shared_memory_is_counted_as_the_header_counts_it(tmp_path):
    text = '#include "lora_kernels/decode_args.h"\n#include <cstdio>\nusing namespace lora;\nint main() {'
    text += 'for (int t : {8, 16, 32, 64}) std::printf("%d %d %d\\n", t, stages_at(t), stage_bytes(t)); }'
    (tmp_path / "sizes.cpp").write_text(text)
    include = f"-I{compile_csrc.SOURCES}/include"
    subprocess.run(["g++", "-std=c++20", include, "sizes.cpp", "-o", "sizes"], cwd=tmp_path, check=True)
    printed = subprocess.run([tmp_path / "sizes"], capture_output=True, text=True, check=True).stdout
    for line in printed.splitlines():
        tokens, head, stage = map(int, line.split())
        assert head == compile_csrc.HEAD + tokens * (compile_csrc.ROWS + 4) * 4
        assert stage == stage_bytes(tokens)


@pytest.mark.parametrize("arch", list(compile_csrc.TARGETS))
def test_every_chip_has_room_for_two_stages(arch):
    assert all(stages_of(tokens, CHIPS[arch].shared) >= 2 for tokens in (8, 16, 32, 64))


@NVCC
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_every_architecture_compiles_without_a_fault(arch):
    rows = csrc_rows([arch])
    assert {(row.dtype, row.M) for row in rows} == {(d, t) for d in ("bfloat16", "float16") for t in (8, 16, 32, 64)}
    assert [(row.tiles, row.faults) for row in rows if row.faults] == []
