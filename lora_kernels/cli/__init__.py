"""The command line: ``lora-kernels COMMAND``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from lora_kernels.cli.boundary import guarded, interruptible


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command (see commands.py) and returns its exit code; starts before torch is imported.

    0: done. 2: an error that the user can correct; 1: a fault (both print one sentence on stderr). 130: Ctrl-C. 141:
    the reader of the output closed the pipe.
    """
    # A thread of OpenMP that waits for another shall sleep, not spin. Measured on two cores, a training step of the
    # demo: beside another busy process 0.4 to 0.5 s instead of 1.3 to 2.6 s, with the cores to itself 0.28 s instead of
    # 0.23 s. OpenMP reads this once, when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in arguments if not word.startswith("-")), "")

    def run() -> int:
        with interruptible():
            commands = importlib.import_module("lora_kernels.cli.commands")
        return commands.main(arguments)

    return guarded(f"lora-kernels {command}".strip(), run)
