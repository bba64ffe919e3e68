"""The command line: ``lora-kernels COMMAND``."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code, see commands.py; starts before torch is imported."""
    # A thread of OpenMP that waits for another shall sleep, not spin. Measured on two cores, a training step of the
    # demo: beside another busy process 0.4 to 0.5 s instead of 1.3 to 2.6 s, with the cores to itself 0.28 s instead of
    # 0.23 s. OpenMP reads this once, when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return importlib.import_module("lora_kernels.cli.commands").main(argv)
