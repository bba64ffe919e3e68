"""The commands, each a file here with add_parser(subparsers), and what becomes of their errors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from lora_kernels import __version__
from lora_kernels.cli import advise, check, compat, demo, doctor, explain, merge, serve_bench, sweep, train, tune
from lora_kernels.errors import LoRAKernelsError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 2 for what the user can mend (one line on stderr), 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="lora-kernels", description="LoRA layers that cost what their base costs.")
    parser.add_argument("--version", action="version", version=f"lora-kernels {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    arguments = list(sys.argv[1:] if argv is None else argv)
    for command in (doctor, demo):
        command.add_parser(subparsers)
    for command in (train, sweep):
        command.add_parser(subparsers, train.chosen_task(arguments))
    for command in (explain, advise, tune, merge, serve_bench, check, compat):
        command.add_parser(subparsers)
    parsed = parser.parse_args(arguments)
    try:
        return parsed.run(parsed)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (LoRAKernelsError, OSError, torch.OutOfMemoryError) as error:
        print(f"lora-kernels {parsed.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
