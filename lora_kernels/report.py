"""What was done to a model: kept on the model, and told as a table."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

from torch import nn

from lora_kernels.config import LoRAConfig
from lora_kernels.errors import BackendUnavailableError
from lora_kernels.layers import LoRALinear
from lora_kernels.plan import describe
from lora_kernels.targets import is_conv1d

REMEMBERED_AS = "lora_injection"


@dataclass(frozen=True)
class LayerPlan:
    """A linear layer of the model: adapted with r and lora_alpha where why_not is None."""

    path: str
    why_not: str | None
    r: int = 0
    lora_alpha: float = 0.0


@dataclass(frozen=True)
class Injection:
    """What apply_lora does to a model: the configuration with its defaults filled in, the plan of every linear layer,
    and the paths of the modules that are trained whole. Kept on the model; survives deepcopy and pickle."""

    config: LoRAConfig
    layers: tuple[LayerPlan, ...]
    saved: tuple[str, ...]

    @property
    def adapted(self) -> dict[str, LayerPlan]:
        """The adapted layers by path."""
        return {layer.path: layer for layer in self.layers if layer.why_not is None}


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and (Distributed)DataParallel's wrappers."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while (inner := model.module if isinstance(model, wrappers) else getattr(model, "_orig_mod", None)) is not None:
        model = inner
    return model


def injection_of(model: nn.Module) -> Injection | None:
    """What apply_lora or load_adapter did to this model; None where neither was called on it."""
    return getattr(unwrap(model), REMEMBERED_AS, None)


def explain(model: nn.Module, tokens: int = 2048) -> str:
    """A table of the model's linear layers: adapted or not and why, rank, scaling, and what runs them at `tokens` rows.

    Layers that differ in nothing but numbers in their paths share a line. The last line counts parameters.
    """
    model = unwrap(model)
    injection = injection_of(model)
    reasons = {layer.path: layer.why_not for layer in injection.layers} if injection else {}
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | LoRALinear) or is_conv1d(module):
            why_not = reasons.get(path) or "apply_lora was not called"
            groups[re.sub(_NUMBER, "*", path), *_columns(module, why_not, tokens)].append(path)
    rows = [["layer", "count", "shape", "r", "scaling", "what runs"]]
    for (_, *columns), paths in groups.items():
        rows.append([_together(paths) or type(model).__name__, str(len(paths)), *columns])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"{path}: trained whole and saved with the adapter" for path in (injection.saved if injection else ())]
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return "\n".join([*lines, f"trainable {trained:,} of {total:,} parameters ({100 * trained / max(total, 1):.3f} %)"])


_NUMBER = r"(?<![^.])\d+(?![^.])"  # a whole segment of a path


def _together(paths: list[str]) -> str:
    """One name for paths that differ in numbers only: "layer.0-3,5.query"; "*" where more than one number varies."""
    numbers = [
        sorted(set(column)) for column in zip(*(map(int, re.findall(_NUMBER, path)) for path in paths), strict=True)
    ]
    one_varies = sum(len(column) > 1 for column in numbers) <= 1
    columns = iter(numbers)

    def spell(_: re.Match[str]) -> str:
        column = next(columns)
        if len(column) > 1 and not one_varies:
            return "*"
        starts = [n for n in column if n - 1 not in column]
        ends = [n for n in column if n + 1 not in column]
        return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))

    return re.sub(_NUMBER, spell, paths[0])


def _columns(module: nn.Module, why_not: str, tokens: int) -> tuple[str, str, str, str]:
    if not isinstance(module, LoRALinear):
        weight = getattr(module, "weight", None)
        return "x".join(map(str, getattr(weight, "shape", "?"))), "-", "-", f"not replaced: {why_not}"
    N, K = module.out_features, module.in_features
    if module.merged:
        runs = "merged: one GEMM"
    else:
        try:
            runs = describe(N, K, module.r, module.weight.dtype, module.weight.device, module.backend, tokens)
        except BackendUnavailableError as error:
            runs = f"cannot run: {error}"
    return f"{N}x{K}", str(module.r), f"{module.scaling:g}", runs
