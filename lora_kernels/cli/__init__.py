"""The command line: ``lora-kernels COMMAND``."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command (see commands.py) and return its exit code. Called before torch is imported.

    0: done. 2: an error that the user can correct; 1: a fault (both print one sentence on stderr). 130: Ctrl-C. 141:
    the reader of the output closed the pipe.
    """
    # Waiting OpenMP threads sleep instead of spinning. Measured on two cores, a training step of the demo takes 0.4 to
    # 0.5 s instead of 1.3 to 2.6 s while another process is busy, and 0.28 s instead of 0.23 s on idle cores. OpenMP
    # reads the variable once, when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:  # before boundary.py, which reports it, was imported
        sys.stderr.write("\ninterrupted\n")
        return 130


def _main(arguments: list[str]) -> int:
    boundary = importlib.import_module("lora_kernels.cli.boundary")
    command = next((word for word in arguments if not word.startswith("-")), "")

    def run() -> int:
        with boundary.interruptible():
            commands = importlib.import_module("lora_kernels.cli.commands")
        return commands.main(arguments)

    return boundary.guarded(f"lora-kernels {command}".strip(), run)
