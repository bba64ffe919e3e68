"""Reports of a sweep: a CSV file, a plot, and an estimate of the noise in the best value."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_kernels.atomic_write import atomic_write
from lora_kernels.finetune.sweep.sweep import Record, show, spread
from lora_kernels.finetune.sweep.trial import LORA
from lora_kernels.finetune.train.extras import require

COLUMNS = ("kind", "state", "value", "trainable", "seconds", "wall", "rows", "seed")
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan")
_BASELINES = {"full": ("*", "black"), "head only": ("P", "dimgray")}


def pareto(records: Sequence[Record], cost: Callable[[Record], float], lower: bool) -> list[Record]:
    """Return the complete records on the Pareto front of ``cost`` and value, by rising cost.

    lower: whether a lower value is better.
    """
    front: list[Record] = []
    sign = 1 if lower else -1
    complete = [record for record in records if record.outcome.state == "complete"]
    for record in sorted(complete, key=lambda r: (cost(r), sign * r.outcome.value)):
        if not front or sign * record.outcome.value < sign * front[-1].outcome.value:
            front.append(record)
    return front


def chance(best: Record, records: Sequence[Record], monitor: str, lower: bool) -> list[str]:
    """Describe the noise in the best value: other seeds, the size of the validation data, near ties."""
    same = [r for r in records if r.kind.startswith(LORA) and r.params == best.params and r.outcome.state == "complete"]
    values = [record.outcome.value for record in same]
    mean, deviation = spread(values)
    lines, noise = [], deviation
    if len(same) > 1:
        figures = ", ".join(f"{record.outcome.value:.4f} (seed {record.seed})" for record in same)
        lines.append(f"the best with other seeds: {figures}; mean {mean:.4f}, standard deviation {deviation:.4f}")
        lines.append("the best of many is partly luck: expect what the other seeds gave, not the first value")
    else:
        lines.append("no other seed was tried (budget or --repeats): how much of the best value is luck is unknown")
    if error := standard_error(best, monitor):
        noise = max(noise, error)
        lines.append(f"standard error of an accuracy measured on {best.outcome.rows:,} rows: {error:.4f}")
    trials = [r for r in records if r.kind == LORA and r.outcome.state == "complete"]
    near = [r for r in trials if abs(r.outcome.value - best.outcome.value) <= noise]
    if len(near) > 1:
        lines.append(f"{len(near)} of {len(trials)} complete trials lie within {noise:.4f} of the best: that is noise")
        least = min(near, key=lambda r: (r.outcome.trainable, r.outcome.value if lower else -r.outcome.value))
        if least != best:
            figures = f"{least.outcome.trainable:,} parameters, {monitor} {least.outcome.value:.4f}"
            params = ", ".join(f"{name} {show(value)}" for name, value in least.params.items())
            lines.append(f"the smallest of them: {figures}; {params}")
    return lines


def standard_error(record: Record, monitor: str) -> float:
    """Compute sqrt(p (1 - p) / n) for an accuracy p on n rows. 0 for other metrics, whose error is unknown."""
    value = record.outcome.value
    if monitor != "accuracy" or not 0 <= value <= 1:
        return 0.0
    return math.sqrt(value * (1 - value) / max(1, record.outcome.rows))


def write_csv(records: Sequence[Record], path: Path, commands: Mapping[int, str]) -> None:
    """Write one row per training, in the order of ``records``. commands: index -> command that repeats it."""
    names = sorted({name for record in records for name in record.params})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *names, "command"])
    for i, record in enumerate(records):
        fields: dict[str, Any] = {"kind": record.kind, "seed": record.seed, **asdict(record.outcome)}
        cells = [fields[name] for name in COLUMNS] + [record.params.get(name, "") for name in names]
        writer.writerow([*cells, commands.get(i, "")])
    atomic_write(path, text.getvalue().encode())


def plot(
    records: Sequence[Record], paths: Sequence[Path], monitor: str, lower: bool, group: Callable[[Record], str]
) -> None:
    """Plot ``monitor`` against trainable parameters and against seconds. Write ``paths`` (.png, .svg).

    Each ``group`` of trials has a colour. Pruned trials are hollow, at their last value. The Pareto front is a line,
    other seeds of the best parameters are ticks, baselines are stars or crosses, and a band shows one standard error
    around the best trial's accuracy.
    """
    figure = require("matplotlib.figure").Figure(figsize=(11, 4.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    seen = [r for r in records if math.isfinite(r.outcome.value)]
    groups = sorted({group(r) for r in seen if r.kind.startswith(LORA)})
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(groups)}
    costs: tuple[Callable[[Record], float], ...] = (lambda r: r.outcome.trainable, lambda r: r.outcome.seconds)
    titles = ("trainable parameters", "training steps, seconds")
    best = pareto([r for r in seen if r.kind == LORA], lambda r: 0.0, lower)
    error = standard_error(best[0], monitor) if best else 0.0
    band = (best[0].outcome.value - error, best[0].outcome.value + error) if error else ()
    for axes, cost, title in zip(panels, costs, titles, strict=True):
        for record in seen:
            _mark(axes, record, cost(record), colors.get(group(record), "black"))
        front = pareto(seen, cost, lower)
        points = [cost(r) for r in front], [r.outcome.value for r in front]
        axes.step(*points, where="post", color="tab:red", linewidth=1.2, alpha=0.8, zorder=1)
        if band:
            axes.axhspan(*band, color="tab:red", alpha=0.08, linewidth=0, zorder=0)
        axes.set_xlabel(title)
        axes.grid(alpha=0.25)
    panels[0].set_xscale("log")
    panels[0].set_ylabel(f"validation {monitor}")
    _frame(panels[0], [r.outcome.value for r in seen if r.outcome.state == "complete"])
    line = require("matplotlib.lines").Line2D
    handles = [line([], [], marker="o", linestyle="", color=colors[name], label=name) for name in groups]
    handles += [line([], [], marker=mark, linestyle="", color=color, markersize=10, label=kind)
                for kind, (mark, color) in _BASELINES.items() if any(r.kind == kind for r in seen)]  # fmt: skip
    if any(r.outcome.state == "pruned" for r in seen):
        hollow = {"marker": "o", "fillstyle": "none", "label": "given up on the way"}
        handles.append(line([], [], linestyle="", color="gray", **hollow))
    if any(r.kind.startswith(f"{LORA},") for r in seen):
        handles.append(line([], [], marker="_", linestyle="", color="gray", markersize=12, label="best, other seeds"))
    handles.append(line([], [], color="tab:red", label="Pareto front"))
    if band:
        handles.append(line([], [], color="tab:red", alpha=0.15, linewidth=8, label="the best, one standard error"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False)
    for path in paths:
        figure.savefig(path, dpi=130, format=path.suffix[1:])


def _mark(axes: Any, record: Record, cost: float, color: str) -> None:
    value = record.outcome.value
    if record.kind in _BASELINES:
        marker, color = _BASELINES[record.kind]
        axes.plot(cost, value, marker, color=color, markersize=11, zorder=3)
    elif record.kind != LORA:
        axes.plot(cost, value, "_", color=color, markersize=14, markeredgewidth=2, zorder=3)
    elif record.outcome.state == "complete":
        axes.plot(cost, value, "o", color=color, markersize=6, alpha=0.85, zorder=2)
    else:
        axes.plot(cost, value, "o", color=color, markersize=5, fillstyle="none", alpha=0.5, zorder=1)


def _frame(axes: Any, values: Sequence[float]) -> None:
    """Limit the value axis to completed trials: pruned ones far away would compress the rest."""
    if values:
        room = max(0.08 * (max(values) - min(values)), 0.002 * abs(max(values)), 1e-9)
        axes.set_ylim(min(values) - room, max(values) + room)
