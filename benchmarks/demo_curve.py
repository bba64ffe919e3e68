"""The demo's model and data, trained by PEFT and by PEFT accelerated: do the loss curves agree?

The packaged MiniLM with a new head and the film-review sentences, dropout 0, the same adapters, batches and optimizer;
judged by the rule of curves.py, with PEFT on the same batches with their rows reversed and rotated as the yardstick.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.cases import Case
from benchmarks.curves import PEFT, REVERSED, ROTATED, TWINS, judged, verdict
from benchmarks.end_to_end import Outcome, Run
from benchmarks.models import Batch, rows_reversed, rows_rotated
from benchmarks.rows import Row
from lora_kernels.config import LoRAConfig
from lora_kernels.finetune.advise.recipe import Recipe
from lora_kernels.finetune.tasks import Classification
from lora_kernels.finetune.train.options import TrainOptions
from lora_kernels.tuning.measure import spread

ACCELERATED = "lora_kernels accelerated"
RECIPE = Recipe(LoRAConfig(r=16, lora_alpha=32), TrainOptions())  # as the demo's
ORDERS = {REVERSED: rows_reversed, ROTATED: rows_rotated}


def runs(task: Classification, device: torch.device) -> Iterator[Run]:
    """PEFT, its twins and the accelerated copy, all from the same weights and adapters."""
    from peft import LoraConfig, get_peft_model

    from lora_kernels.integrations.peft import accelerate

    recipe = RECIPE
    torch.manual_seed(recipe.seed)
    base = task.load_model().to(device)
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    config = LoraConfig(
        r=recipe.lora.r, lora_alpha=recipe.lora.lora_alpha, target_modules="all-linear", task_type="SEQ_CLS"
    )
    adapted: Any = get_peft_model(base, config)
    for name in (PEFT, *TWINS, ACCELERATED):
        model = copy.deepcopy(adapted).train()
        if name == ACCELERATED:
            model = accelerate(model, verbose=False, strict=True)
        yield Run(name, model, recipe.optimizer(model), ORDERS.get(name))


def demo_batches(task: Classification, steps: int, device: torch.device) -> list[Batch]:
    """``steps`` batches of the demo's size, in the order that a seed draws."""
    torch.manual_seed(0)
    loader = task.loader("train", RECIPE.batch_size)
    found = itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), steps)
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in found]


def demo_curve(steps: int, device: torch.device, task: Classification | None = None) -> Outcome:
    """Rows (milliseconds a step, optimizer included), the check of the accelerated curve, and the points of all."""
    task = task or Classification(limit=4000)
    made = list(runs(task, device))
    given = demo_batches(task, steps, device)
    for number, batch in enumerate(given):
        first = number % len(made)
        for run in made[first:] + made[:first]:
            run.step(batch, device)
    curves = list(judged("demo", {run.name: run.losses for run in made}, torch.float32))
    config = made[0].model.get_base_model().config
    case = Case(
        RECIPE.batch_size * task.max_length, config.intermediate_size, config.hidden_size, RECIPE.lora.r,
        dtype=torch.float32, op="train_demo",
    )  # fmt: skip
    times = {run.name: spread(run.times[min(3, steps - 1) :]) for run in made if run.name not in TWINS}
    rows = [
        Row(
            case.op, "train", "fp32", "dense", case.M, case.N, case.K, case.r, 1, 0.0, "" if name == PEFT else "auto",
            name, *time, None, None, None, None, None, time.p50 / times[PEFT].p50,
        )
        for name, time in times.items()
    ]  # fmt: skip
    return Outcome(rows, [verdict(case, ACCELERATED, curves)], curves)
