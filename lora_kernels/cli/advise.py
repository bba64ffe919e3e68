"""``lora-kernels advise``: what each fine-tuning strategy would cost a model, before anything is trained."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import nn

from lora_kernels.cli.explain import AUTO_CLASSES
from lora_kernels.cli.shapes import MODELS, configuration, on_meta
from lora_kernels.errors import ConfigError
from lora_kernels.finetune import values
from lora_kernels.finetune.advise.advise import HEAD_ONLY, Cost, Targets, advise, target_sets

MIB, GIB = 1 << 20, 1 << 30
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RULES = """\
what published experiments say (each measured by its authors, on their models):
- A small rank on more matrices beats a large rank on one, at the same number of parameters; r of 1 to 8 on q,v was
  enough for GPT-3 on two tasks. Hu et al., LoRA, arXiv 2106.09685, tables 5 and 6
- To match full fine-tuning of LLaMA, adapters on all linear layers were needed; the rank hardly mattered then.
  Dettmers et al., QLoRA, arXiv 2305.14314, section 4
- Learning much that is new (code, mathematics) full fine-tuning beats low ranks, and forgets more; adapters learn best
  on all layers, then on the MLP's, then on the attention's, at some ten times the learning rate of full fine-tuning.
  Biderman et al., LoRA Learns Less and Forgets Less, arXiv 2405.09673
- For large ranks scale by alpha / sqrt(r) (--rslora), else their gradients shrink. Kalajdzievski, arXiv 2312.03732
- B may learn faster than A, by a factor such as 16. Hayou et al., LoRA+, arXiv 2402.12354
Which of them hold for your data is what `lora-kernels sweep` measures."""


def add_parser(subparsers: Any) -> None:
    """Declares the command."""
    parser = subparsers.add_parser("advise", help="count what each fine-tuning strategy of a model would cost")
    add = parser.add_argument
    add(
        "model",
        type=values.model,
        metavar="MODEL",
        help=f"a folder, a config.json, a hub id, or one of {', '.join(MODELS)}",
    )
    add("--task-type", choices=sorted(filter(None, AUTO_CLASSES)),
        help="PEFT's task type (default: what the configuration's architecture is for, else SEQ_CLS)")  # fmt: skip
    add("--r", type=values.rank, nargs="+", default=[4, 8, 16, 32, 64], help="ranks (default: 4 8 16 32 64)")
    add("--tokens", type=values.whole(1, 1 << 24), default=128, help="of a sequence (default: %(default)s)")
    add("--batch", type=values.whole(1, 1 << 20), default=8, help="sequences in a batch (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="of the model's weights (default: %(default)s)")
    add(
        "--memory",
        type=values.real(above=0.0, most=1e9),
        metavar="GIB",
        help="say what fits, and how many sequences at a time",
    )
    add("--json", type=values.output_file, metavar="FILE", help="write every row with all its numbers")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the table, the names of the target sets, and the rules of thumb with their sources."""
    config = configuration(arguments.model)
    longest = getattr(config, "max_position_embeddings", None) or arguments.tokens
    if arguments.tokens > longest:
        raise ConfigError(f"--tokens is {arguments.tokens}; this model takes sequences of at most {longest}")
    task_type = arguments.task_type or task_type_of(config)
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # classifiers on decoders look for the last token before padding

    def build() -> nn.Module:
        return on_meta(arguments.model, AUTO_CLASSES[task_type], config, dtype=DTYPES[arguments.dtype])

    costs = advise(build, task_type, sorted(set(arguments.r)), arguments.batch, arguments.tokens)
    memory = None if arguments.memory is None else int(arguments.memory * GIB)
    model = build()
    total = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{type(model).__name__}, {total:,} parameters in {arguments.dtype}; {task_type}; "
        f"batches of {arguments.batch} sequences of {arguments.tokens} tokens\n"
    )
    print(table(costs, memory, arguments.batch))
    print(LEGEND.format(pure=4 * DTYPES[arguments.dtype].itemsize))
    print(f"\ntarget sets, as --targets takes them:\n{names(target_sets(model, task_type))}\n\n{RULES}")
    if arguments.json:
        told = [dataclasses.asdict(cost) | {"memory": cost.memory} for cost in costs]
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(told, indent=1) + "\n")
    return 0


def task_type_of(config: Any) -> str:
    """PEFT's task type for the architecture that a transformers configuration names; SEQ_CLS where it names none."""
    named = (getattr(config, "architectures", None) or [""])[0]
    ends = {
        "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM",
        "MTModel": "SEQ_2_SEQ_LM", "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS",
    }  # fmt: skip
    return next((kind for end, kind in ends.items() if named.endswith(end)), "SEQ_CLS")


def table(costs: Sequence[Cost], memory: int | None, batch: int) -> str:
    """The costs as text, one line each; with ``memory`` in bytes also what fits, and the largest batch."""
    titles = ["strategy", "targets", "r", "trainable", "disk MiB", "MFLOP/token", "weights MiB", "gradients MiB",
              "AdamW MiB", "activations MiB", "sum GiB"]  # fmt: skip
    rows = [titles + ([] if memory is None else ["fits", "sequences"])]
    for cost in costs:
        told = [cost.disk, cost.weights, cost.gradients, cost.optimizer, cost.activations]
        disk, weights, gradients, optimizer, activations = (f"{value / MIB:,.2f}" for value in told)
        rows.append([
            cost.strategy, cost.targets, str(cost.r or ""), f"{cost.trainable:,}", disk, f"{cost.flops / 1e6:,.1f}",
            weights, gradients, optimizer, activations, f"{cost.memory / GIB:.2f}",
        ])  # fmt: skip
        if memory is not None:
            most = "" if cost.strategy == HEAD_ONLY else f"{cost.rows_in(memory, batch):,}"  # it keeps next to nothing
            rows[-1] += ["yes" if cost.memory <= memory else "no", most]
    return aligned(rows, {0, 1})


def aligned(rows: Sequence[Sequence[str]], left: Container[int]) -> str:
    """Rows of cells as lines: the columns in ``left`` flush left, the others, numbers, flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        padded = (cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(cells))
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def names(sets: dict[str, Targets]) -> str:
    """The target sets, one line each, as the command line takes them."""
    return "\n".join(f"  {name}: {t if isinstance(t, str) else ','.join(t)}" for name, t in sets.items())


LEGEND = """
disk: the adapter's files to the byte; else the trained tensors. FLOP: of one forward and backward, without the
optimizer. AdamW: two moments in the weights' dtype, so {pure} bytes a trained value with weight and gradient; 16-bit
weights trained by float32 copies take 16 (Rajbhandari et al., ZeRO, arXiv 1910.02054). activations: what autograd
keeps, with attention by a fused kernel and without checkpointing. Not in the sum: what a kernel needs for a moment,
the CUDA context, fragmentation. Leave room for them."""
