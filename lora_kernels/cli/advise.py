"""``lora-kernels advise``: the cost of each fine-tuning strategy for a model, without training."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lora_kernels.cli.explain import AUTO_CLASSES
from lora_kernels.cli.shapes import MODEL_HELP, configuration, on_meta
from lora_kernels.cli.tables import aligned
from lora_kernels.errors import ConfigError
from lora_kernels.finetune import values
from lora_kernels.finetune.advise.advise import HEAD_ONLY, Cost, Targets, advise, target_sets

MIB, GIB = 1 << 20, 1 << 30
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RULES = """\
what published experiments say (each measured by its authors, on their models):
- A small rank on more matrices beats a large rank on one, at the same number of parameters; r of 1 to 8 on q,v was
  enough for GPT-3 on two tasks. Hu et al., LoRA, arXiv 2106.09685, tables 5 and 6
- To match full fine-tuning of LLaMA, adapters on all linear layers were needed; with them, the rank had little effect.
  Dettmers et al., QLoRA, arXiv 2305.14314, section 4
- On much new knowledge (code, mathematics), full fine-tuning is better than low ranks, and forgets more; adapters are
  best on all layers, then the MLP's, then the attention's, at about ten times the learning rate of full fine-tuning.
  Biderman et al., LoRA Learns Less and Forgets Less, arXiv 2405.09673
- For large ranks scale by alpha / sqrt(r) (--rslora), else their gradients shrink. Kalajdzievski, arXiv 2312.03732
- The learning rate of B may be higher than that of A, by a factor such as 16. Hayou et al., LoRA+, arXiv 2402.12354
`lora-kernels sweep` measures which of them hold for your data."""


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("advise", help="count what each fine-tuning strategy of a model would cost")
    add = parser.add_argument
    add("model", type=values.model, metavar="MODEL", help=MODEL_HELP)
    add("--task-type", choices=sorted(filter(None, AUTO_CLASSES)),
        help="PEFT's task type (default: from the configuration's architecture, else SEQ_CLS)")  # fmt: skip
    add("--r", type=values.rank, nargs="+", default=[4, 8, 16, 32, 64], help="ranks (default: 4 8 16 32 64)")
    add("--tokens", type=values.whole(1, 1 << 24), default=128, help="length of a sequence (default: %(default)s)")
    add("--batch", type=values.whole(1, 1 << 20), default=8, help="sequences in a batch (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="of the model's weights (default: %(default)s)")
    add("--memory", type=values.real(above=0.0, most=1e9), metavar="GIB",
        help="also print what fits into so much memory, and the most sequences in a batch")  # fmt: skip
    add("--json", type=values.output_file, metavar="FILE", help="write every row with all its numbers")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table, the target sets, and rules of thumb with their sources."""
    config = configuration(arguments.model)
    longest = getattr(config, "max_position_embeddings", None) or arguments.tokens
    if arguments.tokens > longest:
        raise ConfigError(f"--tokens is {arguments.tokens}; this model takes sequences of at most {longest}")
    task_type = arguments.task_type or task_type_of(config)
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # decoders classify at the last token before padding

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
        rows = [dataclasses.asdict(cost) | {"memory": cost.memory} for cost in costs]
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def task_type_of(config: Any) -> str:
    """Return PEFT's task type for the architecture in a transformers configuration; SEQ_CLS if unknown."""
    architecture = (getattr(config, "architectures", None) or [""])[0]
    ends = {
        "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM",
        "MTModel": "SEQ_2_SEQ_LM", "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS",
    }  # fmt: skip
    return next((kind for end, kind in ends.items() if architecture.endswith(end)), "SEQ_CLS")


def table(costs: Sequence[Cost], memory: int | None, batch: int) -> str:
    """Format the costs, one line each; with ``memory`` in bytes also whether they fit, and the largest batch."""
    titles = ["strategy", "targets", "r", "trainable", "disk MiB", "MFLOP/token", "weights MiB", "gradients MiB",
              "AdamW MiB", "activations MiB", "sum GiB"]  # fmt: skip
    rows = [titles + ([] if memory is None else ["fits", "sequences"])]
    for cost in costs:
        sizes = [cost.disk, cost.weights, cost.gradients, cost.optimizer, cost.activations]
        disk, weights, gradients, optimizer, activations = (f"{size / MIB:,.2f}" for size in sizes)
        rows.append([
            cost.strategy, cost.targets, str(cost.r or ""), f"{cost.trainable:,}", disk, f"{cost.flops / 1e6:,.1f}",
            weights, gradients, optimizer, activations, f"{cost.memory / GIB:.2f}",
        ])  # fmt: skip
        if memory is not None:
            most = (
                "" if cost.strategy == HEAD_ONLY else f"{cost.rows_in(memory, batch):,}"
            )  # its activations are negligible
            rows[-1] += ["yes" if cost.memory <= memory else "no", most]
    return aligned(rows, {0, 1})


def names(sets: dict[str, Targets]) -> str:
    """Format the target sets, one line each, as --targets accepts them."""
    return "\n".join(f"  {name}: {t if isinstance(t, str) else ','.join(t)}" for name, t in sets.items())


LEGEND = """
disk: exact size of the adapter's files; else of the trained tensors. FLOP: of one forward and backward, without the
optimizer. AdamW: two moments in the weights' dtype, so {pure} bytes per trained value with weight and gradient; 16-bit
weights trained by float32 copies take 16 (Rajbhandari et al., ZeRO, arXiv 1910.02054). activations: tensors that
autograd saves, with fused attention and without checkpointing. Not in the sum: temporary buffers of kernels, the CUDA
context, fragmentation. Leave memory for them."""
