import shutil
import stat
from pathlib import Path

import pytest

from benchmarks import tools

KINDS = ("memcheck", "racecheck")


def _stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A program that answers in the place of the tool."""
    path = folder / "tool"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: str(path))


def test_what_is_not_there_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    found = [*(tools.sanitize(kind, rehearse=False) for kind in KINDS), tools.profile(tmp_path, rehearse=False)]
    assert {check.status for check in found} == {"not run"}
    assert "compute-sanitizer is not on this machine" in found[0].message
    assert "ncu is not on this machine" in found[2].message


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_sanitizer_says_is_what_counts(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(tmp_path, monkeypatch, f'test "$2" = {kind}')
    assert tools.sanitize(kind, rehearse=False).status == "ok"
    _stand_in(tmp_path, monkeypatch, "echo 1 error; exit 9")
    check = tools.sanitize(kind, rehearse=False)
    assert (check.check, check.status) == (kind, "failed")
    assert "exit status 9: 1 error" in check.message


def test_a_profile_is_kept_and_locked_counters_are_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = 'while [ "$1" != "--log-file" ]; do shift; done; '
    _stand_in(tmp_path, monkeypatch, f'{log} echo "_extend_kernel,1" > "$2"')
    assert tools.profile(tmp_path, rehearse=False).status == "ok"
    assert (tmp_path / "profile.csv").read_text() == "_extend_kernel,1\n"
    _stand_in(tmp_path, monkeypatch, f'{log} echo "==ERROR== ERR_NVGPUCTRPERM" > "$2"')
    check = tools.profile(tmp_path, rehearse=False)
    assert (check.status, "ERR_NVGPUCTRPERM" in check.message) == ("not run", True)
    assert not (tmp_path / "profile.csv").exists()
