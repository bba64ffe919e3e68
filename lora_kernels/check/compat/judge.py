"""Compares the accelerated model's results with PEFT's by the error rule, with PEFT in float64 as the truth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.testing import within_rule
from lora_kernels.testing.rule import limits_for

Answers = dict[str, Tensor]
NOISE = 1e-6  # a result this much smaller than the largest of its kind is treated as zero with rounding errors


class Unlike(AssertionError):
    """The results cannot be compared: names, shapes, dtypes or integers differ."""


Errors = dict[str, tuple[float, float]]  # by kind of result: error over PEFT's, by maximum and by root mean square


def errors(got: Answers, plain: Answers, truth: Answers, dtype: torch.dtype) -> Errors:
    """Return the error of ``got``, as a multiple of PEFT's error plus the rule's floor.

    Floating-point results of one kind (the part of the name before ":") are divided by the norm of their truth,
    concatenated and judged together, because a single number is only one draw from the distribution of errors. An error
    in one tensor is still visible by its size.

    Raises:
        Unlike: names, shapes, dtypes or integers differ from those of ``plain``.
    """
    if got.keys() != plain.keys():
        lost, found = sorted(plain.keys() - got.keys()), sorted(got.keys() - plain.keys())
        raise Unlike(f"results without {', '.join(lost) or 'none'}, with {', '.join(found) or 'none'}")
    kinds: dict[str, list[str]] = {}
    for name, tensor in got.items():
        usual = plain[name]
        if tensor.dtype != usual.dtype or tensor.shape != usual.shape:
            raise Unlike(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, PEFT's {usual.dtype} {tuple(usual.shape)}")
        if tensor.is_floating_point():
            kinds.setdefault(name.partition(":")[0], []).append(name)
        elif not torch.equal(tensor, usual):
            raise Unlike(f"{name} differs from PEFT's")
    return {kind: _together([(got[n], plain[n], truth[n]) for n in names], dtype) for kind, names in kinds.items()}


def fault(draws: Sequence[Errors], dtype: torch.dtype, share: float = 1.0) -> str | None:
    """Return a message if the mean ratio of the draws exceeds ``share`` of the rule's limit for any kind, else None.

    In 16 bits one early rounding determines most of a model's error, so the ratio of one draw has a wide spread: over
    16 seeds of four families it was 0.3 to 2.4, ours above and below PEFT's alike, and 0.04 to 12 if a ReLU's input may
    change sign. In float32 one draw of 16 of T5's was 4.5 by maximum, the others 0.7 to 2.3. The mean is geometric,
    over the middle half of the draws.
    """
    limits = limits_for(dtype)
    for kind in draws[0]:
        for norm, name, limit in ((0, "maximum", limits.max_ratio), (1, "root mean square", limits.rms_ratio)):
            ratios = sorted(max(draw[kind][norm], 1e-9) for draw in draws)
            middle = ratios[len(draws) // 4 : len(draws) - len(draws) // 4]
            mean = math.exp(sum(map(math.log, middle)) / len(middle))
            if not mean <= share * limit:
                return f"{kind}: error is {mean:.3g}x PEFT's by {name} (limit {limit:g}x)"
    return None


def _together(results: Sequence[tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype) -> tuple[float, float]:
    sizes = torch.stack([truth.norm() / max(truth.numel(), 1) ** 0.5 for *_, truth in results])
    usual = float(sizes[sizes > NOISE * sizes.max()].median()) if bool((sizes > 0).any()) else 1.0
    scales = [float(size) if size > NOISE * sizes.max() else usual for size in sizes]
    columns = [
        torch.cat([tensor.detach().double().flatten() / scale for tensor, scale in zip(column, scales, strict=True)])
        for column in zip(*results, strict=True)
    ]
    verdict = within_rule(*columns, dtype=dtype)
    ratios = verdict.max_ratio, verdict.rms_ratio
    return ratios if all(map(math.isfinite, ratios)) else (math.inf, math.inf)
