"""The phases of a GPU round, most important first: what each may cost, and what a hang in it costs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """``estimate``: seconds it should take on an H100, with less left it is not begun; ``limit``: the most it gets.

    ``shards``: processes that share its units, above one only where nothing is timed. ``patience``: seconds that one
    unit may take, the start of its process included. ``by_plan``: a unit's first word is a plan that no GPU may have
    run yet; when one hangs, the plan's other units of this phase are given up. ``retries``: how often a process that
    hung is begun anew without blame, where the unit itself remembers what it was at.
    """

    name: str
    estimate: float
    limit: float
    shards: int = 1
    patience: float = float("inf")
    by_plan: bool = False
    retries: int = 0


PHASES = (
    Phase("gemm", 60, 150, patience=45, by_plan=True),
    Phase("check", 60, 180, shards=12, patience=90),
    Phase("target", 90, 240, patience=90),
    Phase("opt_in_check", 60, 200, shards=4, patience=60, by_plan=True),
    Phase("opt_in", 90, 300, patience=60, by_plan=True),
    Phase("small", 90, 240, patience=90),
    Phase("serving", 150, 400, patience=60, by_plan=True),
    Phase("blocks", 60, 200, patience=90),
    Phase("tune", 150, 500, patience=240, retries=4),
    Phase("step", 60, 240, patience=200),
    Phase("accelerate", 90, 240, patience=120),
    Phase("grid", 90, 300, patience=90),
    Phase("compile", 60, 150, patience=120),
    Phase("tools", 60, 200, patience=120),
)
