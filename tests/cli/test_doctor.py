import subprocess
import sys

import torch

from lora_kernels.cli import doctor, main
from lora_kernels.cli.doctor import report
from lora_kernels.kernels import csrc
from lora_kernels.planning.choose import backend_status


def test_says_what_is_here(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "versions:",
        "devices:",
        "backends:",
        "tuned plans:",
        "compiled extension:",
        "demo:",
        torch.__version__,
    ):
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
    assert report()["demo"]["data"].startswith("not there yet: " + str(tmp_path))


def test_runs_as_a_module():
    command = [sys.executable, "-m", "lora_kernels.cli", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "reference" in done.stdout
    assert done.stderr == ""


def test_the_tuned_table_of_a_gpu_is_counted(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    assert doctor._tuned("") == {"table": "none: no GPU here"}
    assert "`lora-kernels tune` writes one" in doctor._tuned("GPU without a table")["table"]
    monkeypatch.setattr(doctor, "table_for", lambda gpu: type("Table", (), {"entries": [1, 2]}))
    assert doctor._tuned("A GPU") == {
        "table": "2 problems measured on A GPU", "yours": f"not there yet: {tmp_path / 'tuned' / 'A_GPU.json'}"
    }  # fmt: skip


def test_the_compiled_extension_is_shown_with_the_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(csrc, "_INFO", tmp_path / "_build_info.json")
    monkeypatch.setattr(csrc, "available", lambda: "no GPU")
    monkeypatch.setattr(csrc, "update_missing", lambda: "no compiler")
    status = {"on a CPU": "cannot run: no compiler", "on a GPU": "cannot run: no GPU"}
    assert doctor._extension() == {"built": "no"} | status
    csrc._INFO.write_text('{"built": "with CUDA for 80", "why": "", "torch": "headers of here"}')
    monkeypatch.setattr(csrc, "available", lambda: None)
    monkeypatch.setattr(csrc, "update_missing", lambda: None)
    status = {"on a CPU": "can run", "on a GPU": "can run"}
    assert doctor._extension() == {"built": "with CUDA for 80", "torch": "headers of here"} | status
