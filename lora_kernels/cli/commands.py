"""The commands. Each is a file in this folder with add_parser(subparsers)."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from collections.abc import Sequence

from lora_kernels import __version__
from lora_kernels.cli import advise, check, compat, demo, doctor, explain, merge, serve_bench, sweep, train, tune


def main(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code. Raises SystemExit(2) for a command line that the parser refuses."""
    # Under torchrun all processes have the same command line: only one reports its errors.
    first = os.environ.get("RANK", "0") == "0"
    with contextlib.nullcontext() if first else contextlib.redirect_stderr(io.StringIO()):
        parsed = parse(arguments)
    return parsed.run(parsed)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(prog="lora-kernels", description="LoRA layers that cost what their base costs.")
    parser.add_argument("--version", action="version", version=f"lora-kernels {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for word in arguments:
        if "\0" in word or word.encode("utf-8", "replace") != word.encode("utf-8", "surrogatepass"):
            parser.error(f"{word[:60]!r} is not text in UTF-8; rename the file, or give the argument in UTF-8")
        if word.startswith("--") and word.endswith("=--"):  # argparse would read it as an option without a value
            parser.error(f"argument {word[:-3]}: '--' was given, which is not a value; give a value")
    for command in (doctor, demo):
        command.add_parser(subparsers)
    for command in (train, sweep):
        command.add_parser(subparsers, train.chosen_task(arguments))
    for command in (explain, advise, tune, merge, serve_bench, check, compat):
        command.add_parser(subparsers)
    return parser.parse_args(arguments)
