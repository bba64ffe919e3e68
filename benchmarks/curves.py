"""When do two loss curves agree?

Training in floating point does not forget the order of its sums: two exact implementations drift apart, and how far
depends on model, data and step. So the yardstick is measured in the same run: PEFT trained on the same batches with
their rows reversed, and with them rotated by one, mathematically the same loss and gradients. A curve agrees with
PEFT's if at every step its relative difference is at most FACTOR times the largest that either twin has shown so far,
plus FLOOR roundings of the loss in the model's dtype: in fp32 the rule is sharp, in bf16 (1.6 %) it catches what is
plainly wrong.

Why two twins and FACTOR = 8: of PEFT against itself (compiled; two random orders of the rows) on the models of
end_to_end's CPU size, fp32, 30 steps at a learning rate of 5e-3, 4 seeds each, 24 curves in all, the farthest reached
2.43 times what the twins had reached by then, the next 1.35. With one twin the farthest reached 6: drift has a heavy
tail.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields

import torch

from benchmarks.cases import DTYPE_NAMES, Case
from benchmarks.rows import Check, Machine, Record

FACTOR, FLOOR = 8.0, 4.0
PEFT, REVERSED, ROTATED = "peft", "peft, rows reversed", "peft, rows rotated"
TWINS = (REVERSED, ROTATED)
CURVE = ("model", "implementation", "step", "loss", "difference", "allowed")


def curve_columns() -> list[str]:
    """The columns of curves.csv: a point's, then the machine's."""
    return [*CURVE, *(field.name for field in fields(Machine))]


def floor(dtype: torch.dtype) -> float:
    """The difference that counts for nothing, whatever the yardstick says."""
    return FLOOR * torch.finfo(dtype).eps / 2


def judged(model: str, losses: dict[str, list[float]], dtype: torch.dtype) -> Iterator[Record]:
    """A record a step and contender: its loss, how far it lies from PEFT's, and how far it may."""
    theirs, reached, allowed = losses[PEFT], 0.0, []
    for one, *others in zip(theirs, *(losses[twin] for twin in TWINS), strict=True):
        reached = max(reached, *(abs(other - one) / abs(one) for other in others))
        allowed.append(FACTOR * reached + floor(dtype))
    for name, curve in losses.items():
        for step, (loss, one, limit) in enumerate(zip(curve, theirs, allowed, strict=True), start=1):
            values = model, name, step, loss, abs(loss - one) / abs(one), limit
            yield dict(zip(CURVE, values, strict=True))


def verdict(case: Case, name: str, curves: Sequence[Record]) -> Check:
    """Whether the curve of ``name`` keeps the rule; false for a loss that is not finite."""
    own = [point for point in curves if point["implementation"] == name]
    ratios = [point["difference"] / point["allowed"] for point in own]
    ratio = next((r for r in ratios if math.isnan(r)), max(ratios))
    worst, ok = own[ratios.index(ratio)], ratio <= 1
    said = f"step {worst['step']}: relative difference {worst['difference']:.2e}, allowed {worst['allowed']:.2e}"
    return Check(
        "curve", DTYPE_NAMES[case.dtype], case.M, case.N, case.K, case.r, 0.0, name, case.op,
        "ok" if ok else "failed", ratio, None, "" if ok else said,
    )  # fmt: skip
