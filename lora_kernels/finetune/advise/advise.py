"""The cost of each fine-tuning strategy, without training: parameters, bytes on disk, FLOPs, memory.

No value is estimated from a model's name or from formulas of its architecture. The model is built on the meta device,
adapters are injected, and one forward and backward run with fake tensors, which have shapes and no data. FLOPs are
counted by torch.utils.flop_counter; activations are the tensors that autograd saves. Both are affine in the rank, so
two ranks determine all others.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lora_kernels.adapters.files import CONFIG_METADATA, NO_FILE, REPLACED_METADATA
from lora_kernels.adapters.keys import PREFIX
from lora_kernels.config import ALL_LINEAR, LoRAConfig
from lora_kernels.errors import ConfigError
from lora_kernels.finetune.train.fake_step import fake_step
from lora_kernels.models.explain import injection_of
from lora_kernels.models.inject import apply_lora, plan_injection
from lora_kernels.models.targets import TASK_HEADS

Targets = str | list[str]
_SAFETENSORS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_MAGNITUDE = "lora_magnitude_vector"
HEAD_ONLY = "head only"
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


@dataclass(frozen=True)
class Cost:
    """The cost of one strategy in bytes, and FLOPs per token of one forward and backward.

    disk: bytes that saving writes: both files of an adapter, else the trained tensors. weights: all parameters and
    buffers. gradients: of the trained parameters. optimizer: AdamW's two moments. Each is in its parameter's dtype.
    activations: tensors saved for the backward of one batch. Temporary memory of a step is not counted.
    """

    strategy: str
    targets: str
    r: int
    trainable: int
    disk: int
    flops: float
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def memory(self) -> int:
        """Sum weights, gradients, optimizer state and activations, in bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def rows_in(self, memory: int, batch: int) -> int:
        """Compute how many rows (sequences) of a batch fit in ``memory`` bytes; this cost has ``batch`` rows."""
        available = memory - (self.memory - self.activations)
        return max(0, available * batch // max(self.activations, 1))


def target_sets(model: nn.Module, task_type: str | None = None) -> dict[str, Targets]:
    """Return {name: target_modules} of the sets of linear layers to compare in this model.

    "q,v": the query and value projections (LoRAConfig's default). "attention": linear layers with "attn" or "attention"
    in their path. "mlp": all other linear layers, including poolers. "all-linear". Sets that do not exist in the model
    are left out. Raises ConfigError for a model without linear layers.
    """
    found: dict[str, Targets] = {}
    with contextlib.suppress(ConfigError):  # no projections of a known name
        found["q,v"] = plan_injection(model, LoRAConfig(task_type=task_type)).config.target_modules or []
    every = plan_injection(model, LoRAConfig(target_modules=ALL_LINEAR, task_type=task_type))
    attention = [path for path in every.adapted if _ATTENTION.search(path)]
    mlp = [path for path in every.adapted if not _ATTENTION.search(path)]
    modules = [path for path, _ in model.named_modules()]
    if attention and mlp:
        found |= {"attention": select(attention, modules), "mlp": select(mlp, modules)}
    return found | {ALL_LINEAR: ALL_LINEAR}


def select(paths: Sequence[str], modules: Sequence[str]) -> Targets:
    """Return target_modules that match exactly ``paths`` among ``modules``: names if possible, else one regex."""
    names = sorted({path.rpartition(".")[2] for path in paths})
    if {path for path in modules if path.rpartition(".")[2] in names} == set(paths):
        return names
    kinds = sorted({re.sub(r"\b\d+\b", r"\\d+", path.replace(".", r"\.")) for path in paths})
    if len(kinds) == 1:
        return kinds[0]
    parts = [kind.split(r"\.") for kind in kinds]
    same = 0
    while len({tuple(part[: same + 1]) for part in parts}) == 1:
        same += 1
    ends = "|".join(r"\.".join(part[same:]) for part in parts)
    return r"\.".join([*parts[0][:same], f"({ends})"])


def adapter_bytes(model: nn.Module) -> int:
    """Compute the bytes of the two files that save_adapter writes for this model (bias="none", meta is allowed).

    Raises ConfigError for a model without adapters or with trained biases.
    """
    injection = injection_of(model)
    if injection is None or injection.config.bias != "none":
        raise ConfigError('bytes on disk are counted of a model that apply_lora was called on, with bias="none"')
    state = model.state_dict()
    tensors = {
        f"{PREFIX}{path}.{name}.weight": state[f"{path}.{name}"]
        for path in injection.adapted
        for name in ("lora_A", "lora_B")
    }
    if injection.config.use_dora:
        tensors |= {f"{PREFIX}{path}.{_MAGNITUDE}": state[f"{path}.{_MAGNITUDE}"] for path in injection.adapted}
    saved = tuple(f"{path}." for path in injection.saved)
    tensors |= {PREFIX + name: tensor for name, tensor in state.items() if name.startswith(saved)}
    text = json.dumps(replace(injection.config, inference_mode=True).to_peft_dict(), indent=2, sort_keys=True)
    metadata = {"format": "pt", CONFIG_METADATA: text, REPLACED_METADATA: NO_FILE}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for key in sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key)):  # as safetensors orders them
        tensor, start = tensors[key], end
        end += tensor.numel() * tensor.dtype.itemsize
        shape = list(tensor.shape)
        header[key] = {"dtype": _SAFETENSORS[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + length + -length % 8 + end + len(text.encode())


def train_only(model: nn.Module, task_type: str | None) -> nn.Module:
    """Freeze all of ``model`` except its new head, in place. Raises ConfigError if the task type has no new head."""
    heads = TASK_HEADS.get(task_type or "", ())
    found = [module for path, module in model.named_modules() if path.rpartition(".")[2] in heads]
    if not found:
        raise ConfigError(f"{type(model).__name__} has no fresh head to train alone (task type {task_type})")
    model.requires_grad_(False)
    for module in found:
        module.requires_grad_(True)
    return model


def cost_of(model: nn.Module, strategy: str, targets: str, r: int, batch: int, tokens: int) -> Cost:
    """Compute the cost of training the parameters of ``model`` that require a gradient."""
    flops, saved = fake_step(model, batch, tokens)
    trained = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() * p.element_size() for p in trained)
    return Cost(
        strategy=strategy,
        targets=targets,
        r=r,
        trainable=sum(p.numel() for p in trained),
        disk=size if injection_of(model) is None else adapter_bytes(model),
        flops=flops / (batch * tokens),
        weights=sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())),
        gradients=size,
        optimizer=2 * size,
        activations=saved,
    )


def advise(
    build: Callable[[], nn.Module], task_type: str | None, ranks: Sequence[int], batch: int, tokens: int
) -> list[Cost]:
    """Compute the costs of LoRA per target set and rank, DoRA on all linear layers, the head only, and full training.

    build: returns a new model on the meta device. The row of the head is missing if the model has no new head.
    """
    rows = []
    for name, targets in target_sets(build(), task_type).items():
        kinds = ("LoRA", "DoRA") if name == ALL_LINEAR else ("LoRA",)
        for kind in kinds:
            make = partial(_adapted, build, targets, task_type, kind == "DoRA")
            rows += _at_ranks(make, kind, name, ranks, batch, tokens)
    with contextlib.suppress(ConfigError):  # a language model's head is pretrained
        rows.append(cost_of(train_only(build(), task_type), HEAD_ONLY, "", 0, batch, tokens))
    return [*rows, cost_of(build().requires_grad_(True), "full", "", 0, batch, tokens)]


def _adapted(build: Callable[[], nn.Module], targets: Targets, task_type: str | None, dora: bool, r: int) -> nn.Module:
    return apply_lora(build(), LoRAConfig(r=r, target_modules=targets, task_type=task_type, use_dora=dora))


def _at_ranks(
    make: Callable[[int], nn.Module], kind: str, targets: str, ranks: Sequence[int], batch: int, tokens: int
) -> list[Cost]:
    """Interpolate the cost at every rank from two ranks. Only the file's header is not affine in r."""
    ends = {r: cost_of(make(r), kind, targets, r, batch, tokens) for r in sorted({min(ranks), max(ranks)})}
    low, high = ends[min(ranks)], ends[max(ranks)]

    def between(r: int) -> Cost:
        share = (r - low.r) / (high.r - low.r)

        def at(one: float, other: float) -> float:
            return one + share * (other - one)

        return replace(
            low,
            r=r,
            trainable=round(at(low.trainable, high.trainable)),
            disk=adapter_bytes(make(r)),
            flops=at(low.flops, high.flops),
            weights=round(at(low.weights, high.weights)),
            gradients=round(at(low.gradients, high.gradients)),
            optimizer=round(at(low.optimizer, high.optimizer)),
            activations=round(at(low.activations, high.activations)),
        )

    return [ends[r] if r in ends else between(r) for r in ranks]
