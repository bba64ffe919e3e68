"""Where the time over the frozen layer goes: the cost model's launches one by one, beside what was measured.

The prediction is the planner's (lora_kernels.planning.cost) for a chip's data-sheet figures; it is not a measurement.
A launch that contains the base product counts with what it takes beyond the vendor's plain product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.cases import DTYPE_NAMES, Case, case_of
from benchmarks.figures import Drawn
from benchmarks.rows import Record
from benchmarks.style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, YELLOW, new_figure
from lora_kernels.kernels.chip import CHIPS, Chip
from lora_kernels.planning.choose import FORWARD_ONLY, OPT_IN, PLANS
from lora_kernels.planning.cost import CallShape, library, seconds
from lora_kernels.planning.plans import BY_NAME, launches

CASE = Case(8192, 4096, 4096, 16)
COLORS = {
    "XA: a pass over X": SKY,
    "adding the update to Y": VERMILION,
    "base product forward, ours over the library's": BLUE,
    "dYB and dB: passes over dY": GREEN,
    "adding the update to dX": PURPLE,
    "base product backward, ours over the library's": ORANGE,
    "dA: a pass over X": YELLOW,
    "reductions": GREY,
}
_PARTS = dict.fromkeys(("dYB", "dB", "dyb_db"), "dYB and dB: passes over dY")
_PARTS |= dict.fromkeys(("XA", "shrink"), "XA: a pass over X") | dict.fromkeys(("dA", "da"), "dA: a pass over X")
_PARTS |= {"reduce": "reductions", "expand": "adding the update to dX"}


@dataclass(frozen=True)
class Step:
    """One launch: its kernel, what it is for, and its seconds beyond what the frozen layer needs as well."""

    kernel: str
    part: str
    extra: float


def frozen_seconds(case: Case, chip: Chip) -> float:
    """Predicted seconds of the frozen layer, forward and backward."""
    e = case.dtype.itemsize
    products = (case.M, case.N, case.K, e), (case.M, case.K, case.N, e)
    return sum(seconds(library("matmul", *sizes), case.dtype, chip) for sizes in products)


def steps(plan: str, case: Case, chip: Chip) -> list[Step] | None:
    """The launches of forward and backward by ``plan``; None where it refuses the case."""
    found: list[Step] = []
    for op in ("fwd", "bwd"):
        q = CallShape(op, case.M, case.N, case.K, case.r, case.dtype, dropout=case.p > 0)
        name = (FORWARD_ONLY.get(plan) or "eager") if op == "bwd" and plan in FORWARD_ONLY else plan
        direction = BY_NAME[name].fwd if op == "fwd" else BY_NAME[name].bwd
        if direction is None or direction.refused(q, chip):
            return None
        base = seconds(library("matmul", case.M, case.N, case.K, case.dtype.itemsize), case.dtype, chip)
        for launch in launches(name, q):
            own = seconds(launch, case.dtype, chip)
            holds_base = launch.flop >= 2 * case.M * case.N * case.K
            found.append(Step(launch.kernel, _part(launch.kernel, op, holds_base), own - base if holds_base else own))
    return found


def _part(kernel: str, op: str, holds_base: bool) -> str:
    """What a launch is for: a key of COLORS."""
    if holds_base:
        return f"base product {'forward' if op == 'fwd' else 'backward'}, ours over the library's"
    return _PARTS.get(kernel) or f"adding the update to {'Y' if op == 'fwd' else 'dX'}"


def waterfall(rows: Sequence[Record], case: Case = CASE, arch: str = "sm_90") -> Drawn:
    """A bar a plan, for dropout 0 and 0.1: predicted launches end to end over the frozen layer, measured as a cross."""
    chip = CHIPS[arch]
    plans = PLANS + OPT_IN
    figure, grid = new_figure(10.5, 1.6 + 0.42 * len(plans), 1, 2, sharey=True)
    for axes, p in zip(grid.flat, (0.0, 0.1), strict=True):
        one = replace(case, p=p)
        frozen = frozen_seconds(one, chip)
        for place, plan in enumerate(plans):
            parts = steps(plan, one, chip)
            if parts is None:
                axes.annotate("refuses", (1, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7)
                continue
            left = 1.0
            extras = {part: sum(s.extra for s in parts if s.part == part) / frozen for part in COLORS}
            for part, width in sorted(extras.items(), key=lambda item: item[1] > 0):  # what a plan saves comes first
                if abs(width) > 1e-6:
                    axes.barh(place, width, left=left, height=0.62, color=COLORS[part], edgecolor="white",
                              linewidth=0.5, label=part)  # fmt: skip
                left += width
            measured = _measured(rows, one, plan)
            if measured is not None:
                axes.plot(measured, place, "X", color=BLACK, markersize=7, zorder=5, label="measured")
            said = f"{left:.3f}" if measured is None else f"{left:.3f}, measured {measured:.3f}"
            axes.annotate(said, (max(left, 1, measured or 0), place), xytext=(8, 0), textcoords="offset points",
                          va="center", fontsize=7)  # fmt: skip
        axes.axvline(1, color=BLACK, linewidth=1)
        axes.set_title(f"dropout {p:g}", fontsize=9)
        axes.set_xlabel("time / frozen layer", fontsize=8)
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.2)
    grid[0, 0].set_yticks(range(len(plans)), plans, fontsize=8)
    grid[0, 0].set_ylim(len(plans) - 0.5, -0.5)
    handles = {
        label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    names = [name for name in (*COLORS, "measured") if name in handles]
    grid[0, 1].legend([handles[name] for name in names], names, fontsize=7, frameon=False, loc="center left",
                      bbox_to_anchor=(1.02, 0.5), title="launches for", title_fontsize=7)  # fmt: skip
    shape = f"M={case.M}, N={case.N}, K={case.K}, r={case.r}, {DTYPE_NAMES[case.dtype]}"
    return figure, f"Where the time over the frozen layer goes, predicted: forward + backward, {shape}"


def note(arch: str = "sm_90") -> str:
    """What the prediction rests on."""
    chip = CHIPS[arch]
    return (
        f"Predicted by lora_kernels.planning.cost from the data sheet of {arch} ({chip.tflops:g} TFLOP/s, "
        f"{chip.gbps:g} GB/s); "
        "not a measurement"
    )


def _measured(rows: Sequence[Record], case: Case, plan: str) -> float | None:
    """The measured ratio of this plan on this case, where a row has it."""
    for row in rows:
        asked = row["op"], row["mode"], row["implementation"], row["plan"].partition(" ")[0]
        if asked == (case.op, "fwd_bwd", "lora_kernels", plan) and case_of(row) == case:
            return row["ratio_to_frozen"]
    return None
