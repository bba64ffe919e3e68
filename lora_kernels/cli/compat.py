"""``lora-kernels compat``: run PEFT's features on every model family after accelerate, and tabulate what works."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

from lora_kernels.errors import ConfigError
from lora_kernels.finetune import values
from lora_kernels.finetune.train.extras import require

BEGIN, END = "<!-- compatibility: written by lora-kernels compat --readme -->", "<!-- end of compatibility -->"


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("compat", help="run every PEFT feature on every model family, accelerated or not")
    parser.add_argument("--families", default="", help='names or parts of them, ";" between (default: all)')
    parser.add_argument("--features", default="", help='names or parts of them, ";" between (default: all)')
    parser.add_argument(
        "--markdown", type=values.output_file, metavar="FILE", help="write the table, docs/compatibility.md"
    )
    parser.add_argument(
        "--readme", type=values.input_path, metavar="FILE", help="write a short table between the markers in FILE"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the cells and print a line for each. Return 1 if one is wrong."""
    for library in ("transformers", "peft"):
        require(library)
    table = importlib.import_module("lora_kernels.check.compat.table")
    families, features = table.chosen(arguments.families, arguments.features)
    page = arguments.readme.read_text() if arguments.readme else ""
    if arguments.readme and not (BEGIN in page and END in page.partition(BEGIN)[2]):
        raise ConfigError(f"{arguments.readme} has no place for the table: put the lines {BEGIN} and {END} into it")
    found = []
    for cell in table.cells(families, features):
        found.append(cell)
        print(table.line(cell), flush=True)
    written = arguments.markdown or arguments.readme
    groups = {family: table.together(family) for family in families} if written else {}
    if arguments.markdown:
        arguments.markdown.write_text(table.page(found, groups))
    if arguments.readme:
        before, _, rest = page.partition(BEGIN)
        arguments.readme.write_text(f"{before}{BEGIN}\n{table.short(found, groups)}\n{END}{rest.partition(END)[2]}")
    wrong = sum(cell.status == "WRONG" for cell in found)
    print(f"{len(found)} cells, {wrong} wrong")
    if wrong:
        print("lora-kernels compat: there are cells that are WRONG", file=sys.stderr)
    return 1 if wrong else 0
