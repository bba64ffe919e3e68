"""Reports how many of a model's PEFT LoRA layers are fused, and why the others are not.

Every fused class has ``why_not() -> str | None``: the reason in its present state, None if it runs fused. Calls that
PEFT's own forward ran are counted in the layer, by reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from lora_kernels.integrations.peft.linear import UNCALLED, described
from lora_kernels.models.targets import uncalled

SHOWN = 3  # paths printed per reason


@dataclass(frozen=True)
class Report:
    """Hold the PEFT LoRA layers of a model by path: None if fused, else the reason why PEFT's own forward runs."""

    layers: dict[str, str | None]

    @property
    def fused(self) -> tuple[str, ...]:
        """Paths of the fused layers."""
        return tuple(path for path, reason in self.layers.items() if reason is None)

    @property
    def others(self) -> dict[str, str]:
        """Reasons by path of the layers that run PEFT's own forward."""
        return {path: reason for path, reason in self.layers.items() if reason is not None}

    def __str__(self) -> str:
        summary = f"{len(self.fused)} of {len(self.layers)} PEFT LoRA layers fused"
        by_reason = defaultdict[str, list[str]](list)
        for path, reason in self.others.items():
            by_reason[reason].append(path)
        if not by_reason:
            return summary if self.layers else f"{summary}: the model has none"
        lines = []
        for reason, paths in by_reason.items():
            more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
            lines.append(f"  {len(paths)}: {reason} ({', '.join(paths[:SHOWN])}{more})")
        return "\n".join([f"{summary}; PEFT's own forward runs the others, because", *lines])


def why_not(module: LoraLayer, fused: Mapping[type, type]) -> str | None:
    """Return the reason why PEFT's own forward runs, or None. ``fused``: our class for each class of PEFT's."""
    if UNCALLED in module.__dict__:
        return module.__dict__[UNCALLED]
    if "forward" in module.__dict__:
        return "its forward is patched"
    own = getattr(module, "why_not", None)
    if own is not None:
        return own()
    kind = type(module)
    if kind in fused:
        return "lora_kernels.accelerate(model) was not called since PEFT made it"
    if isinstance(module, tuple(fused)) and not kind.__module__.startswith("peft."):
        return f"its class was changed to {kind.__module__}.{kind.__name__}: call accelerate before that"
    base = type(getattr(module, "base_layer", module))
    return f"{kind.__module__}.{kind.__name__} over {base.__module__}.{base.__name__} has no fused path"


def mark_uncalled(model: nn.Module) -> None:
    """Mark each LoRA layer whose owner reads its weight but never calls it, so that its adapter has no effect."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, reason in uncalled(model).items():
        layer, owner = modules.get(path), modules.get(path.rpartition(".base_layer.")[0])
        if isinstance(layer, LoraLayer):
            merged = f"PEFT's {type(owner).__name__} merges it into the weight at each call"
            vars(layer)[UNCALLED] = merged if isinstance(owner, LoraLayer) else f"its adapter has no effect: {reason}"


def report(model: nn.Module, fused: Mapping[type, type]) -> Report:
    """Return the report on every LoRA layer that PEFT made in the model."""
    layers = ((path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer))
    return Report({path: why_not(module, fused) for path, module in layers})


def row(module: LoraLayer, fused: Mapping[type, type]) -> tuple[str, str, str, str]:
    """Return the layer's row in lora_kernels.explain: shape, r and scaling of its active adapters, and what runs it."""
    return described(module, why_not(module, fused))
