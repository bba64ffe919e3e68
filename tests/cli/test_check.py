"""`lora-kernels check`: what it reports, what it exits with, and that a crashing compiler costs one case."""

import argparse
import json
import subprocess
from dataclasses import asdict, replace

import pytest

from lora_kernels.cli import check

ROW = check.Row("_extend_kernel", "extend r=16", "M64 N64 K64 warps4 stages3", "bfloat16", "sm_90", 96, 0, 0, 40960, 8)
BEGUN = replace(ROW, kernel="", registers=0, shared=0, matrix=0)
RED = replace(ROW, kernel="_shrink_kernel", case="shrink r=16", spills=4, stack=8, faults=("4 spill instructions",))


def _run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    check.add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["check", "--compile", *arguments])
    return parsed.run(parsed)


@pytest.mark.parametrize(
    ("rows", "code", "verdict"), [([ROW], 0, "all may ship"), ([ROW, RED], 1, "1 of them must not ship"), ([], 1, "")]
)
def test_exit_code_and_table(
    rows: list[check.Row], code: int, verdict: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "compile_matrix", lambda *_: rows)
    assert _run("--archs", "sm_90") == code
    out = capsys.readouterr().out
    assert verdict in out
    assert ("4 spill instructions" in out) == (RED in rows)
    assert out.splitlines()[0].split()[:3] == ["kernel", "case", "config"]


def test_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []
    monkeypatch.setattr(check, "compile_matrix", lambda *arguments: asked.append(arguments) or [ROW])
    _run("--jobs", "2")
    _run("--quick", "--jobs", "2")
    _run("--quick", "--archs", "gfx942", "--jobs", "2")
    assert asked == [
        (tuple(check.CHIPS), (), 2),
        (check.QUICK_ARCHS, check.QUICK_DTYPES, 2),
        (["gfx942"], check.QUICK_DTYPES, 2),
    ]


def test_an_unknown_architecture_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _run("--archs", "sm_20")
    assert "sm_20" in capsys.readouterr().err


def _process(code: int, *rows: check.Row, stderr: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], code, "\n".join(json.dumps(asdict(row)) for row in rows), stderr)


def test_a_crash_of_the_compiler_is_a_fault_of_its_case_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    second = replace(BEGUN, case="shrink r=16")
    runs = iter([_process(-11, BEGUN, ROW, second, stderr="LLVM ERROR"), _process(0, BEGUN, replace(ROW, case="da"))])
    starts: list[int] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        starts.append(json.loads(command[-1])["start"])
        return next(runs)

    monkeypatch.setattr(check.subprocess, "run", run)
    rows = check.compile_matrix(["sm_90"], jobs=1)
    assert starts == [0, 2]
    assert [row.case for row in rows] == ["da", "extend r=16", "shrink r=16"]
    assert [list(row.faults) for row in rows] == [[], [], ["the compiler crashed with -11: LLVM ERROR"]]


def test_a_matrix_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.subprocess, "run", lambda *_, **__: _process(1, stderr="No module named 'triton'"))
    with pytest.raises(RuntimeError, match="No module named 'triton'"):
        check.compile_matrix(["sm_90"], jobs=1)
