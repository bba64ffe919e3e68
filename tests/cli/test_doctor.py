import subprocess
import sys

import torch

from lora_kernels.cli import main
from lora_kernels.cli.doctor import report
from lora_kernels.plan import backend_status


def test_says_what_is_here(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for part in ("versions:", "devices:", "backends:", "compiled extension:", "demo:", torch.__version__):
        assert part in shown


def test_every_backend_has_a_finding():
    findings = report()["backends"]
    for name, reason in backend_status().items():
        assert findings[name] == (f"cannot run: {reason}" if reason else "can run")


def test_a_missing_library_is_said(monkeypatch):
    monkeypatch.setattr("lora_kernels.cli.doctor.LIBRARIES", ("no-such-library",))
    assert report()["versions"]["no-such-library"] == "not installed"


def test_the_cache_is_shown(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert report()["demo"]["data"].startswith("not fetched yet: " + str(tmp_path))


def test_runs_as_a_module():
    command = [sys.executable, "-m", "lora_kernels.cli", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "reference" in done.stdout
    assert done.stderr == ""
