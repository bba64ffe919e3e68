"""Every shipped kernel configuration compiles for every architecture within its limits, on a machine without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kernels.cli.check import QUICK_ARCHS, QUICK_DTYPES, compile_matrix, table
from lora_kernels.kernels.chip import CHIPS


def _assert_all_may_ship(archs: tuple[str, ...], dtypes: tuple[str, ...]) -> None:
    rows = compile_matrix(archs, dtypes)
    red = [row for row in rows if row.faults]
    assert {row.arch for row in rows} == set(archs)
    assert not red, f"{len(red)} of {len(rows)} kernels must not ship:\n{table(red)}"


def test_a_representative_part() -> None:
    _assert_all_may_ship(QUICK_ARCHS, QUICK_DTYPES)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", CHIPS)
def test_everything(arch: str) -> None:
    _assert_all_may_ship((arch,), ())


def test_offsets_are_wide_enough_whatever_the_strides() -> None:
    script = Path(__file__).parent / "testing" / "strided_kernels.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    narrow = json.loads(done.stdout)
    assert len(narrow) >= 6  # shrink, extend, one_pass and the backward's
    assert {name: lines for name, lines in narrow.items() if lines} == {}
