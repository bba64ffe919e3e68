"""The figures of what is no single layer: the host's overhead, whole training runs."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence

from benchmarks.figures import Drawn
from benchmarks.rows import Record
from benchmarks.style import GREY, legend, look_of, new_figure, ordered

TRAINED = {
    "llama": "a Llama-shaped model with random weights",
    "bert": "a BERT with random weights",
    "demo": "the demo's MiniLM on film reviews",
}


def host_overhead(rows: Sequence[Record]) -> Drawn:
    """Microseconds the host spends on a call, by mode and dropout."""
    rows = [row for row in rows if row["op"] == "overhead"]
    if not rows:
        return None
    groups = list(dict.fromkeys((row["mode"], row["dropout"]) for row in rows))
    names = ordered([row["implementation"] for row in rows])
    figure, grid = new_figure(8, 3.6)
    axes = grid[0, 0]
    for row in rows:
        place, name = groups.index((row["mode"], row["dropout"])), row["implementation"]
        where = place + 0.85 * ((names.index(name) + 0.5) / len(names) - 0.5)
        value = 1e3 * row["ms_p50"]
        ends = [[value - 1e3 * row["ms_p20"]], [1e3 * row["ms_p80"] - value]]
        axes.bar(where, value, 0.8 / len(names), color=look_of(name).color, label=name,
                 yerr=ends, error_kw={"elinewidth": 0.8})  # fmt: skip
        axes.annotate(
            f"{value:.0f}", (where, value), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=6
        )
    words = {"fwd_no_grad": "forward, no_grad", "fwd": "forward", "fwd_bwd": "forward + backward"}
    axes.set_xticks(range(len(groups)), [f"{words[mode]}\ndropout {p:g}" for mode, p in groups], fontsize=7)
    axes.set_ylabel("microseconds a call", fontsize=8)
    axes.grid(visible=False, axis="x")
    legend(axes, loc="upper left")
    return figure, "What the host spends on a call (tensors of 4 x 16)"


def whole_steps(rows: Sequence[Record]) -> Drawn:
    """Time of a whole step and MiB saved for its backward in times of PEFT's, by model, targets and dropout."""
    rows = [row for row in rows if str(row["op"]).startswith("step_")]
    theirs = {(row["op"], row["dtype"], row["dropout"]): row for row in rows if row["implementation"] == "peft"}
    rows = [
        row for row in rows if row["implementation"] != "peft" and (row["op"], row["dtype"], row["dropout"]) in theirs
    ]
    if not rows:
        return None
    groups = list(dict.fromkeys((row["op"], row["dtype"], row["dropout"]) for row in rows))
    names = ordered([row["implementation"] for row in rows])
    figure, grid = new_figure(10, 1.6 + 0.45 * len(groups), 1, 2, sharey=True)
    for axes, column, words in ((grid[0, 0], "ms_p50", "time"), (grid[0, 1], "saved_mib", "saved for backward")):
        for row in rows:
            key = row["op"], row["dtype"], row["dropout"]
            one, name = theirs[key], row["implementation"]
            where = groups.index(key) + 0.8 * ((names.index(name) + 0.5) / len(names) - 0.5)
            ratio = row[column] / one[column]
            axes.barh(where, ratio, 0.75 / len(names), color=look_of(name).color, label=name)
            axes.annotate(f"{ratio:.3f}", (ratio, where), xytext=(-3, 0), color="white", ha="right", va="center",
                          textcoords="offset points", fontsize=7)  # fmt: skip
        axes.axvline(1, color=GREY, linewidth=1, linestyle=":")
        axes.set_xlabel(f"{words}, in PEFT's", fontsize=8)
        axes.grid(visible=False, axis="y")
    labels = [f"{op.removeprefix('step_').replace('_', ', ')} {dtype}\ndropout {p:g}" for op, dtype, p in groups]
    grid[0, 0].set_yticks(range(len(groups)), labels, fontsize=7)
    grid[0, 0].invert_yaxis()
    legend(grid[0, 1], loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return figure, "A whole step of PEFT's model, accelerated"


def training(points: Sequence[Record], rows: Sequence[Record], model: str) -> Drawn:
    """Loss by step, its distance from PEFT's beside what the rule allows, and tokens a second."""
    points = [point for point in points if point["model"] == model]
    rows = [row for row in rows if row["op"] == f"train_{model}"]
    if not points:
        return None
    figure, grid = new_figure(11, 3.4, 1, 3 if rows else 2)
    by_name: dict[str, list[Record]] = defaultdict(list)
    for point in points:
        by_name[point["implementation"]].append(point)
    for name in ordered(list(by_name)):
        look, own = look_of(name), by_name[name]
        steps, losses = [point["step"] for point in own], _smooth(point["loss"] for point in own)
        grid[0, 0].plot(steps, losses, color=look.color, linestyle=look.line, label=name,
                        linewidth=2.2 if look.front else 1.1)  # fmt: skip
        if name != "peft":
            drawn = [point["difference"] or float("nan") for point in own]
            grid[0, 1].plot(steps, drawn, color=look.color, marker=".", linestyle="none", label=name)
    limit = next(iter(by_name.values()))
    grid[0, 1].plot([p["step"] for p in limit], [p["allowed"] for p in limit], color=GREY, linewidth=1, label="allowed")
    grid[0, 1].set_yscale("log")
    grid[0, 0].set(xlabel="step", ylabel="loss, mean of 5 steps")
    grid[0, 1].set(xlabel="step", ylabel="|loss - PEFT's| / PEFT's")
    for axes in grid[0, :2]:
        axes.legend(fontsize=6.5, frameon=False)
    for row in rows:
        rate = row["M"] / row["ms_p50"] * 1e3
        grid[0, 2].barh(row["implementation"], rate, color=look_of(row["implementation"]).color)
        grid[0, 2].annotate(f"{rate:,.0f}", (rate, row["implementation"]), xytext=(-3, 0), color="white", ha="right",
                            textcoords="offset points", va="center", fontsize=7)  # fmt: skip
    if rows:
        grid[0, 2].set_xlabel("tokens a second (median step)")
        grid[0, 2].invert_yaxis()
        grid[0, 2].grid(visible=False, axis="y")
    for axes in grid.flat:
        axes.xaxis.label.set_size(8)
        axes.yaxis.label.set_size(8)
    return figure, f"Training {TRAINED[model]}"


def _smooth(losses: Iterable[float]) -> list[float]:
    known = list(losses)
    return [statistics.fmean(known[max(0, i - 4) : i + 1]) for i in range(len(known))]
