import os
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


@pytest.mark.slow
def test_waiting_threads_sleep_unless_the_variable_is_set():
    """The policy is set before torch is imported: OpenMP reads it then."""
    code = (
        "import os, sys, lora_kernels.cli; assert 'torch' not in sys.modules; "
        "lora_kernels.cli.main(['doctor']); print(os.environ['OMP_WAIT_POLICY'])"
    )
    for given, expected in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        environment |= {"OMP_WAIT_POLICY": given} if given else {}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == expected
