import subprocess
import sys

import pytest

from lora_kernels import __version__
from lora_kernels.cli import main


def test_version_and_help(capsys):
    for option, part in (("--version", __version__), ("--help", "doctor")):
        with pytest.raises(SystemExit) as stopped:
            main([option])
        assert stopped.value.code == 0
        assert part in capsys.readouterr().out


def test_a_command_is_needed(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2


def test_the_module_runs():
    done = subprocess.run([sys.executable, "-m", "lora_kernels.cli", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"lora-kernels {__version__}")
