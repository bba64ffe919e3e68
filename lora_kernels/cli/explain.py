"""``lora-kernels explain``: which layers of a model get adapters, why others do not, and the plan of each."""

from __future__ import annotations

import argparse
from typing import Any

from lora_kernels.cli.train import names_or_pattern
from lora_kernels.config import LoRAConfig
from lora_kernels.finetune import values
from lora_kernels.finetune.tasks.pretrained import MINILM, load_pretrained
from lora_kernels.kernels.chip import CHIPS
from lora_kernels.models.inject import apply_lora, explain

AUTO_CLASSES = {
    None: "AutoModel",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("explain", help="show which layers of a model get adapters, and why")
    parser.add_argument(
        "--model", type=values.model, default=MINILM, help="packaged model, hub id or folder (default: %(default)s)"
    )
    parser.add_argument("--task-type", choices=sorted(filter(None, AUTO_CLASSES)), help="PEFT's task type")
    parser.add_argument("--targets", default="all-linear", help="all-linear, a regular expression, or names")
    parser.add_argument("--exclude", help="names with commas between, or a regular expression")
    parser.add_argument("--r", type=values.rank, default=16)
    parser.add_argument("--alpha", type=values.number, default=32)
    parser.add_argument(
        "--tokens", type=values.count, default=2048, help="rows that plans are chosen for (default: %(default)s)"
    )
    parser.add_argument("--layer", metavar="PATH", help="show one layer: every plan with its cost, and the chosen one")
    parser.add_argument("--chip", choices=CHIPS, help="plan for this architecture; it need not be present")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Load the model, inject adapters, print the table."""
    config = LoRAConfig(
        r=arguments.r,
        lora_alpha=arguments.alpha,
        target_modules=names_or_pattern(arguments.targets),
        exclude_modules=names_or_pattern(arguments.exclude),
        task_type=arguments.task_type,
    )
    model = load_pretrained(AUTO_CLASSES[arguments.task_type], arguments.model)
    print(explain(apply_lora(model, config), arguments.tokens, arguments.layer, arguments.chip))
    return 0
