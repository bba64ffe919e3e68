"""What the compiler makes of the ring: operand descriptors that are canonical, fences and barriers where copies and
products need them. The emulator knows nothing of either. PTX ISA, "Asynchronous warpgroup level matrix shared memory
layout": rows of `swizzle` bytes in groups of eight, groups stride apart, repetitions along the rows leading apart."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_kernels.kernels.hopper.gluon_ring import low_rank_operand

BOX = 64 * 128  # bytes of a box of 64 rows and 128 bytes


def by_rows(swizzle):
    """An operand whose rows are along the reduction: eight rows a group, 16 steps of it 32 bytes further."""
    return {(swizzle, 0, 8 * swizzle, start) for start in range(0, swizzle, 32)}


def by_columns(swizzle, rows, leading=0, start=0):
    """An operand whose rows are across the reduction: 16 rows of it are two groups further."""
    return {(swizzle, leading, 8 * swizzle, start + row * swizzle) for row in range(0, rows, 16)}


def canonical(kernel, r):
    """(swizzle, leading, stride, start) of every operand of a kernel with 128x256x64 tiles."""
    big = by_rows(128)  # X, W, A for XA; dY
    if kernel != "gluon_dx":
        return big | by_rows(2 * r)  # XA and B
    across = by_columns(128, 64, BOX) | by_columns(128, r, 2 * r * 64)  # W; A: 64 columns a box
    x = by_columns(128, 64) | by_columns(128, 64, start=2 * BOX)  # X^T, 128 of its 256 columns at a time
    return big | by_rows(2 * r) | across | x | by_columns(2 * r, 64)  # dYB for dX; dYB beside X


@pytest.fixture(scope="module")
def compiled():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    script = Path(__file__).parent / "compiled_gluon.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("r", [16, 32, 64])
@pytest.mark.parametrize("kernel", ["gluon_extend", "gluon_one_launch", "gluon_dx"])
def test_operand_descriptors_are_canonical(kernel, r, compiled):
    assert {tuple(found) for found in compiled[f"{kernel} {r}"]["descriptors"]} == canonical(kernel, r)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_fences_and_barriers_stand_between_stores_and_their_readers(compiled):
    """What is stored through registers is fenced, and joined by a barrier, before a copy, a product or an arrival."""
    for name, told in compiled.items():
        events, stores = told["events"], 0
        for i, event in enumerate(events):
            if event == "store":
                stores += 1
                assert events[i + 1 : i + 3] == ["fence", "barrier"], (name, events[i : i + 4])
                assert events[i + 3] in {"copy", "product", "expect"}, (name, events[i : i + 4])
        assert stores == {"gluon_extend": 2, "gluon_one_launch": 3, "gluon_dx": 4}[name.split()[0]]


def test_low_rank_operands_are_copied_only_where_descriptors_need_it():
    good = torch.randn(40, 16, dtype=torch.bfloat16)
    assert low_rank_operand(good, torch.bfloat16) is good
    for t in (good.float(), good.mT, good[:, :9].contiguous(), good[:, 1:9]):
        copy = low_rank_operand(t, torch.bfloat16)
        assert copy.data_ptr() != t.data_ptr()
        assert torch.equal(copy, t.to(torch.bfloat16))
        assert copy.stride(1) == 1
        assert copy.stride(0) % 8 == 0
