"""Derives the configuration of an adapter without one: ranks from its matrices, alphas from its alpha tensors."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_kernels.adapters.keys import PREFIX, shown
from lora_kernels.config import LoRAConfig
from lora_kernels.errors import AdapterFormatError
from lora_kernels.models.targets import Matcher


def number(key: str, tensor: Tensor) -> float:
    """The one finite number in the tensor. Raises AdapterFormatError."""
    stored = tensor.layout == torch.strided and not tensor.is_meta
    if not stored or tensor.numel() != 1 or tensor.is_complex() or not torch.isfinite(tensor.double()).all():
        raise AdapterFormatError(f"{shown(key)} has shape {tuple(tensor.shape)}, expected one finite number")
    return float(tensor)


def settings_of(metadata: Mapping[str, Any], names: tuple[str, ...]) -> LoRAConfig | None:
    """PEFT's settings for the component with one of these names ("unet.lora_alpha"), else the settings for all
    components ("lora_alpha"); None if there are none."""
    mine = {
        field.removeprefix(f"{name}."): value
        for name in names
        for field, value in metadata.items()
        if field.startswith(f"{name}.")
    } or {field: value for field, value in metadata.items() if "." not in field}
    if not mine:
        return None
    return LoRAConfig.from_peft_dict({"peft_type": "LORA"} | {k: v for k, v in mine.items() if k != "target_modules"})


def implied_config(
    tensors: Mapping[str, Tensor], alphas: Mapping[str, float], settings: Mapping[str, LoRAConfig | None]
) -> dict[str, Any]:
    """The configuration with the rank and the alpha of every module."""
    ranks = dict[str, int]()
    for key, tensor in tensors.items():
        path, _, kind = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        if tensor.dim() < 2 or 0 in tensor.shape:
            raise AdapterFormatError(f"{key} has shape {tuple(tensor.shape)}, expected a matrix")
        if kind == "A" or path not in ranks:
            ranks[path] = tensor.shape[0 if kind == "A" else 1]
    alone = alphas.keys() - ranks.keys()
    if alone or not ranks:
        raise AdapterFormatError(
            f"{min(alone, default='the file')} has no lora_A and lora_B (only an alpha, or nothing); expected both"
        )
    scaled = dict[str, float]()
    for path, rank in ranks.items():
        config = settings.get(path)
        if path in alphas or config is None:
            scaled[path] = alphas.get(path, float(rank))
        else:
            scaled[path] = config.scaling(rank, Matcher(config).rank_and_alpha(path)[1]) * rank
    r, alpha = (Counter(values).most_common(1)[0][0] for values in (ranks.values(), scaled.values()))
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": _patterns(ranks, r),
        "alpha_pattern": _patterns(scaled, alpha),
    }


def _patterns(values: Mapping[str, Any], usual: float) -> dict[str, Any]:
    """{pattern: value} for the paths whose value differs from ``usual``. The pattern is the path itself, which is
    cheaper to match; if a path also matches other paths, each pattern is anchored to match one path only."""
    others = {path: value for path, value in values.items() if not math.isclose(value, usual, rel_tol=1e-12)}
    matcher = Matcher(LoRAConfig(lora_alpha=usual, alpha_pattern=others))
    if all(matcher.rank_and_alpha(path)[1] == others.get(path, usual) for path in values):
        return others
    return {f"^{re.escape(path)}$": value for path, value in others.items()}
