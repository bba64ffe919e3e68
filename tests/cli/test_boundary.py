import errno
import importlib
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

from lora_kernels.cli import boundary, main
from lora_kernels.cli.boundary import explained, guarded, interruptible
from lora_kernels.errors import ConfigError


def run(arguments, environment=None, **options):
    command = [sys.executable, "-m", "lora_kernels.cli", *arguments]
    return subprocess.run(
        command, env={**os.environ, **(environment or {})}, capture_output=True, text=True, errors="replace", **options
    )


def raised_by(library, error, tmp_path, monkeypatch):
    """Raise ``error`` from code of another package."""
    (tmp_path / library).mkdir()
    (tmp_path / library / "__init__.py").write_text("def call(error):\n    raise error\n")
    monkeypatch.setattr(boundary.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, library, raising=False)
    return lambda: importlib.import_module(library).call(error)


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (ConfigError("r is 0; give 1 or more"), "r is 0; give 1 or more"),
        (SafetensorError("Error while deserializing header"), "safetensors refused (SafetensorError: Error while"),
        (SafetensorError('IoError(Os { code: 28, kind: StorageFull, message: "No space" })'), "free some space"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/x"),
            "'out/x': free some space, or write to another disk",
        ),
        (OSError(errno.EFBIG, "File too large", "out/x"), "raise the limit"),
        (PermissionError(errno.EACCES, "Permission denied", "out/x"), "choose a place that you may read or write"),
        (MemoryError(), "not enough memory: use smaller sizes"),
        (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory: use smaller sizes"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "use smaller sizes"),
        (json.JSONDecodeError("Expecting value", "x", 0), "could not be decoded as JSON or UTF-8 (JSONDecodeError"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates"), "UnicodeEncodeError"),
    ],
)
def test_errors_of_others_are_one_sentence(error, part, capsys):
    def fail():
        raise error

    assert guarded("lora-kernels train", fail) == 2
    shown = capsys.readouterr().err
    assert part in shown
    assert shown.startswith("lora-kernels train: ")
    assert shown.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("bad\nvalue"), KeyError("x"), Exception("expected value at line 1")])
def test_what_a_library_raises_names_the_library(error, tmp_path, monkeypatch, capsys):
    assert guarded("lora-kernels x", raised_by("otherlib", error, tmp_path, monkeypatch)) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"lora-kernels x: otherlib refused ({type(error).__name__}: ")
    assert "LORA_KERNELS_TRACEBACK=1 shows where" in shown
    assert shown.count("\n") == 1


def test_a_fault_of_this_package_is_not_the_users_mistake(monkeypatch, capsys):
    monkeypatch.setattr("lora_kernels.cli.doctor.report", lambda: {}["missing"])
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().err
    assert "KeyError: 'missing'; this is a fault of lora_kernels, please report it" in shown
    assert "Traceback" not in shown
    monkeypatch.setenv("LORA_KERNELS_TRACEBACK", "1")
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "doctor.py" in shown


def test_the_traceback_shows_for_mistakes_too(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("LORA_KERNELS_TRACEBACK", "1")
    assert main(["explain", "--model", str(tmp_path)]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_long_reason_is_cut():
    text, _ = explained(RuntimeError("x" * 100_000))
    assert len(text) < 500


STOP = """
import builtins, sys
MODULE = {module!r}
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == MODULE:
            sys.meta_path.remove(self)
            {action}
sys.meta_path.insert(0, Finder())
"""
RAISE, SIGNAL = "raise KeyboardInterrupt", "import os, signal; os.kill(os.getpid(), signal.SIGINT)"


@pytest.mark.sampled(5)
@pytest.mark.parametrize("action", [RAISE, SIGNAL], ids=["raised", "signalled"])
@pytest.mark.parametrize(
    "module",
    ["lora_kernels.cli.boundary", "torch", "torch.nn", "lora_kernels.cli.commands", "lora_kernels.finetune.values"],
)
def test_ctrl_c_during_the_imports_ends_with_130(tmp_path, module, action):
    (tmp_path / "sitecustomize.py").write_text(STOP.format(module=module, action=action))
    path = os.pathsep.join(filter(None, [str(tmp_path), os.getcwd(), os.environ.get("PYTHONPATH")]))
    done = run(["doctor"], {"PYTHONPATH": path})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n")


def swallow(hidden):
    """Extension modules may clear or convert a KeyboardInterrupt while they load."""
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        if hidden:
            raise ImportError("initialization failed") from None


def test_ctrl_c_that_an_import_swallows_is_not_lost():
    for hidden in (False, True):
        with pytest.raises(KeyboardInterrupt), interruptible():
            swallow(hidden)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with interruptible():
        pass


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("arguments", "status"), [(["doctor"], 141), (["train", "--help"], 0)])  # argparse passes on
def test_a_closed_pipe_ends_quietly(arguments, status):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "lora_kernels.cli", *arguments], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (status, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_behind_stdout_is_one_sentence():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "lora_kernels.cli", "doctor"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert "No space left on device: free some space" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_narrow_and_closed_streams(tmp_path):
    assert run(["explain", "--model", "é"], {"PYTHONIOENCODING": "ascii"}).returncode == 2
    done = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m lora_kernels.cli doctor >&- 2>&-"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_arguments_that_are_no_text_are_refused():
    done = run([b"train", b"--out", b"\xff\xfe"])
    assert done.returncode == 2
    assert "is not text in UTF-8" in done.stderr
    assert "Traceback" not in done.stderr
