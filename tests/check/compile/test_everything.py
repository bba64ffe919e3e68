"""Every shipped kernel configuration compiles for every architecture within its limits, on a machine without a GPU."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from lora_kernels.check.compile.cases import shipped_cases
from lora_kernels.check.compile.matrix import _bare, compile_matrix
from lora_kernels.cli.check import PAGE_ARCHS, QUICK_ARCHS, QUICK_DTYPES, TITLES, cells, on_page, table
from lora_kernels.kernels.chip import CHIPS
from lora_kernels.kernels.tiles import is_valid

PAGE = Path(__file__).parents[3] / "docs" / "compile_matrix.md"
COLUMNS = [title for title in TITLES if title not in ("dtype", "faults")]


def _assert_all_may_ship(archs: tuple[str, ...], dtypes: tuple[str, ...], kernels: tuple[str, ...] = ()) -> None:
    rows = compile_matrix(archs, dtypes, kernels)
    red = [row for row in rows if row.faults]
    assert {row.arch for row in rows} == set(archs)
    assert not red, f"{len(red)} of {len(rows)} kernels must not ship:\n{table(red)}"


def test_a_representative_part() -> None:
    _assert_all_may_ship(QUICK_ARCHS, QUICK_DTYPES, ("extend", "shrink", "tma_extend", "gluon_extend"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("arch", CHIPS)
def test_everything(arch: str) -> None:
    _assert_all_may_ship((arch,), ())


@pytest.mark.parametrize("arch", CHIPS)
def test_a_shipped_configuration_is_a_valid_one_and_each_case_stands_once(arch: str) -> None:
    cases = list(shipped_cases(arch))
    for case in cases:
        if not case.kernel.startswith("swiglu"):  # no ranks, no stages
            assert is_valid(case.config, case.dtype, case.r, CHIPS[arch]) is None, case.label
        assert case.label.startswith(f"{case.kernel} r={case.r}")
        assert case.label.endswith(" odd") == (case.N % 16 > 0 or case.K % 16 > 0)
    assert len({_bare(arch, case).key for case in cases}) == len(cases)
    assert {"shrink", "extend", "one_pass", "dyb_db", "dx_da", "da", "expand"} <= {case.kernel for case in cases}


def _page() -> dict[str, list[list[str]]]:
    """The cells of the committed page by architecture."""
    tables: dict[str, list[list[str]]] = {}
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            tables[line.removeprefix("## ")] = []
        elif line.startswith("| ") and tables:
            tables[list(tables)[-1]].append([cell.strip() for cell in line.strip("|").split("|")])
    return tables


def test_the_committed_page_has_what_ships() -> None:
    tables = _page()
    assert tuple(tables) == PAGE_ARCHS
    for arch, (titles, _, *lines) in tables.items():
        assert titles == COLUMNS
        rows = [_bare(arch, case) for case in shipped_cases(arch)]
        ships = {(row.kernel, row.variant, row.tiles) for row in rows if on_page(row)}
        assert {tuple(line[:3]) for line in lines if not line[1].startswith("of ")} == ships, (
            f"{arch} of {PAGE.name} is not what ships: lora-kernels check --compile --markdown docs/{PAGE.name}"
        )
    assert "Written by `lora-kernels check --compile" in PAGE.read_text()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(f"with Triton {version('triton')}:" not in PAGE.read_text(), reason="another Triton wrote the page")
def test_the_committed_page_is_what_the_compiler_gives() -> None:
    written = {tuple(line) for line in _page()["sm_90"][2:]}
    keep = [TITLES.index(title) for title in COLUMNS]
    rows = [row for row in compile_matrix(["sm_90"], ["bfloat16"]) if on_page(row)]
    assert {tuple(cells(row)[i] for i in keep) for row in rows} == written


@pytest.mark.slow
def test_offsets_are_wide_enough_whatever_the_strides() -> None:
    script = Path(__file__).parents[2] / "testing" / "strided_kernels.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    narrow = json.loads(done.stdout)
    assert len(narrow) >= 7  # shrink, extend, one_pass, ptr_one_launch and the backward's
    assert {name: lines for name, lines in narrow.items() if lines} == {}
