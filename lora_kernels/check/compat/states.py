"""Scenarios in which adapters are added, deleted, changed and switched in an existing model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn

from lora_kernels.check.compat.families import Inputs, fill_adapters
from lora_kernels.check.compat.judge import Answers
from lora_kernels.check.compat.stage import Stage
from lora_kernels.operands.slots import BASE


def _two(stage: Stage) -> tuple[Any, Inputs]:
    """Return a model with two adapters and no trained head, which PEFT allows for one adapter at a time."""
    return stage.build(stage.config(task_type=None), others=[stage.config(r=3, task_type=None)])


def several_active(stage: Stage) -> Answers:
    """Run two active adapters of different rank, in evaluation and in training."""
    model, inputs = _two(stage)
    model.base_model.set_adapter(["default", "other0"])
    return stage.step(model, inputs) | stage.infer(model, inputs)


def set_and_delete(stage: Stage) -> Answers:
    """Run three adapters one after another, then delete one of them."""
    model, inputs = stage.build(others=[stage.config(r=3), stage.config(r=5)])
    answers: Answers = {}
    for name in ("other0", "default", "other1"):
        model.set_adapter(name)
        answers |= stage.step(model, inputs, name)
    model.delete_adapter("other0")
    model.set_adapter("default")
    return answers | stage.step(model, inputs, "after one was deleted")


def mixed_batch(stage: Stage) -> Answers:
    """Run a batch whose rows have different adapters, one row none."""
    model, inputs = _two(stage)
    model = stage.cast(model).eval()
    with torch.no_grad():
        logits = model(**inputs, adapter_names=["default", "other0", BASE]).logits
    return {"output:logits": logits} | stage.step(model.train(), inputs, "afterwards")


def added_later(stage: Stage) -> Answers:
    """Add a first adapter on the attention, and a later one on every linear layer."""
    model, inputs = stage.build(stage.config(stage.family.attention))
    answers = stage.step(model, inputs, "before")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model.add_adapter("later", stage.config())
    model.set_adapter("later")
    fill_adapters(model)
    return answers | stage.step(model, inputs, "with the later one")


def weighted(stage: Stage) -> Answers:
    """Run a third adapter that combines two."""
    model, inputs = _two(stage)
    model = stage.cast(model)
    model.add_weighted_adapter(["default", "other0"], [0.7, -0.4], "both", combination_type="cat")
    model.set_adapter("both")
    return stage.step(model, inputs)


def disabled(stage: Stage) -> Answers:
    """Run the base model alone inside disable_adapter, then the adapter again."""
    model, inputs = stage.build()
    with model.disable_adapter():
        answers = stage.infer(model, inputs, "disabled")
    return answers | stage.step(model, inputs, "afterwards")


def merged(stage: Stage) -> Answers:
    """Run the merged model, then the unmerged one."""
    model, inputs = stage.build()
    model = stage.cast(model)
    model.merge_adapter()
    answers = stage.infer(model, inputs, "merged")
    model.unmerge_adapter()
    return answers | stage.step(model, inputs, "unmerged")


def unloaded(stage: Stage) -> Answers:
    """Run the plain model that merge_and_unload returns after a step."""
    model, inputs = stage.build()
    answers = stage.step(model, inputs, "before")
    return answers | stage.infer(model.merge_and_unload(), inputs, "unloaded")


def hotswapped(stage: Stage) -> Answers:
    """Replace the values of the loaded adapter by those of a saved one."""
    other, _ = stage.build(stage.config(task_type=None))
    fill_adapters(other, seed=9)
    model, inputs = stage.build(stage.config(task_type=None))
    answers = stage.step(model, inputs, "before")
    with tempfile.TemporaryDirectory() as folder:
        other.save_pretrained(Path(folder))
        hotswap_adapter(model, folder, "default")
    return answers | stage.step(model, inputs, "after")


def hooked(stage: Stage) -> Answers:
    """Change the outputs of base_layer, lora_A and lora_B, in one layer each, by forward hooks; then remove these."""
    model, inputs = stage.build()
    layers = [module for module in model.modules() if hasattr(module, "lora_A") and len(module.lora_A)]
    parts: list[nn.Module] = [layers[0].base_layer, layers[1].lora_A["default"], layers[-1].lora_B["default"]]
    handles = [part.register_forward_hook(_doubled) for part in parts]
    answers = stage.step(model, inputs, "with hooks")
    for handle in handles:
        handle.remove()
    return answers | stage.step(model, inputs, "without")


def _doubled(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return 2 * output
