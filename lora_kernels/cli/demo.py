"""``lora-kernels demo``: fine-tune a BERT on real sentences, in about a minute and a half on two cores."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_kernels.cli import train
from lora_kernels.finetune import values
from lora_kernels.finetune.tasks import Classification
from lora_kernels.finetune.tasks.classification import MOVIES

# Chosen on the validation data.
SETTINGS = {"limit": 4000, "no_checkpoints": True, "beside_peft": True}


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("demo", help="fine-tune a BERT on real sentences, and time PEFT on the same steps")
    parser.add_argument(
        "--out", type=values.output_folder, default=Path("out"), help="folder for the results (default: %(default)s)"
    )
    parser.add_argument(
        "--model", type=values.model, default=Classification.model, help="packaged model, hub id or folder"
    )
    parser.add_argument(
        "--data", type=values.input_file(MOVIES), default=MOVIES, help="movies, or a .csv, .tsv or .jsonl file"
    )
    parser.add_argument("--limit", type=values.whole(), default=SETTINGS["limit"], help="sentences to train on")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run ``train`` with the demo's settings."""
    parser = argparse.ArgumentParser()
    train.add_arguments(parser, Classification)
    settings = parser.parse_args([])
    vars(settings).update(SETTINGS)
    vars(settings).update({name: value for name, value in vars(arguments).items() if name in vars(settings)})
    return train.run_command(settings)
