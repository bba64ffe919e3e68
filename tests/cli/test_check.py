"""`lora-kernels check`: its report, exit status and files."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest

from lora_kernels.check.compile.matrix import Row
from lora_kernels.cli import check

ROW = Row(
    "sm_90", "extend", "r=16", "bfloat16", "128x128x64 w8 s3", 8192, 4096, 4096, 16,
    registers=115, shared=98304, blocks=2, warps=16, limit="registers", instructions={"HGMMA": 5, "LDGSTS": 24},
    flop=275_950_000_000, moved=168_200_000, seconds=560.5e-6, bound="compute", code="ABCD",
)  # fmt: skip
RED = replace(ROW, kernel="shrink", spills=4, stack=8, M=64, faults=("4 spill instructions", "8 bytes of stack"))
UNKNOWN = replace(ROW, kernel="new", instructions={}, flop=0, moved=0, seconds=0.0, bound="")


@pytest.fixture(autouse=True)
def no_csrc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile nothing; the rows of csrc/ are tested in tests/check/compile/test_csrc.py."""
    monkeypatch.setattr(check, "why_none", lambda: None)
    monkeypatch.setattr(check, "csrc_rows", lambda *_: [])


def _run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    check.add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["check", "--compile", *arguments])
    return parsed.run(parsed)


@pytest.mark.parametrize(
    ("rows", "code", "verdict"),
    [
        ([ROW], 0, "all may ship"),
        ([ROW, RED], 1, "1 of them must not ship"),
        ([], 1, "there is nothing to compile"),
    ],
)
def test_exit_code_and_table(
    rows: list[Row], code: int, verdict: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "compile_matrix", lambda *_: rows)
    assert _run("--archs", "sm_90") == code
    out = capsys.readouterr().out
    assert verdict in out
    assert ("4 spill instructions; 8 bytes of stack" in out) == (RED in rows)
    if rows:
        assert out.splitlines()[0] == "sm_90"
        assert out.splitlines()[1].split()[:3] == ["kernel", "variant", "dtype"]


def test_a_row_says_what_it_takes_and_what_is_predicted() -> None:
    shown = dict(zip(check.TITLES, check.cells(ROW), strict=True))
    assert shown["shared B"] == "98,304"
    assert (shown["blocks/SM"], shown["warps/SM"], shown["limit"]) == ("2", "16", "registers")
    assert (shown["matrix instr."], shown["TMA"], shown["cp.async"]) == ("5 HGMMA", "-", "24")
    assert (shown["MB"], shown["GFLOP"], shown["FLOP/B"]) == ("168.2", "275.95", "1640.6")
    assert (shown["us"], shown["bound"]) == ("560.5", "compute")


def test_a_kernel_that_the_cost_model_does_not_know_has_dashes() -> None:
    shown = dict(zip(check.TITLES, check.cells(UNKNOWN), strict=True))
    assert {shown[title] for title in ("matrix instr.", "MB", "GFLOP", "FLOP/B", "us", "bound")} == {"-"}


def test_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []
    monkeypatch.setattr(check, "compile_matrix", lambda *arguments: asked.append(arguments) or [ROW])
    _run("--jobs", "2")
    _run("--quick", "--jobs", "2")
    _run("--quick", "--archs", "gfx942", "--kernels", "extend", "da", "--jobs", "2")
    assert asked == [
        (tuple(check.CHIPS), (), (), 2),
        (check.QUICK_ARCHS, check.QUICK_DTYPES, (), 2),
        (["gfx942"], check.QUICK_DTYPES, ["extend", "da"], 2),
    ]


def test_an_unknown_architecture_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _run("--archs", "sm_20")
    assert "sm_20" in capsys.readouterr().err


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "compile_matrix", lambda *_: [ROW, RED])
    files = ("--json", str(tmp_path / "rows.json"), "--markdown", str(tmp_path / "page.md"))
    _run("--quick", "--archs", "sm_80", "sm_90", *files)
    first, second = json.loads((tmp_path / "rows.json").read_text())
    assert Row(**{**first, "faults": ()}) == ROW
    assert second["faults"] == ["4 spill instructions", "8 bytes of stack"]
    page = (tmp_path / "page.md").read_text()
    assert (
        "Written by `lora-kernels check --compile --quick --archs sm_80 sm_90 --markdown page.md`\nwith Triton 3."
        in page
    )
    assert "| extend | r=16 | 128x128x64 w8 s3 | 8192x4096x4096 | 115 |" in page
    assert "| shrink |" not in page  # of 64 rows
    assert "1 kernels must not ship" in page
    assert "- sm_90 shrink r=16 bfloat16 128x128x64 w8 s3: 4 spill instructions; 8 bytes of stack" in page


def test_rows_of_csrc_stand_among_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = replace(ROW, kernel="a_kernel", instructions={"HMMA": 3, "UBLKCP": 2})
    monkeypatch.setattr(check, "compile_matrix", lambda *_: [ROW])
    monkeypatch.setattr(check, "csrc_rows", lambda *_: [own])
    assert _run("--archs", "sm_90") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["sm_90", "kernel", "a_kernel", "extend"]
    monkeypatch.setattr(check, "why_none", lambda: "no nvcc in PATH")
    assert _run("--archs", "sm_90") == 0
    assert "csrc/ is left out: no nvcc in PATH" in capsys.readouterr().out
