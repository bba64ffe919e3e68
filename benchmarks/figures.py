"""The figures of layers: ratios to the frozen layer, roofline, memory.

Each function takes rows and gives a Figure and its title, or None where the rows hold nothing to show.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from benchmarks.cases import OPS, case_of
from benchmarks.roofline import Ceilings, passes
from benchmarks.rows import Record
from benchmarks.style import BLACK, OURS, legend, look_of, new_figure, ordered, ratio_scale, series_of
from lora_kernels.planning.choose import OPT_IN, PLANS

Drawn = tuple[Figure, str] | None
PASSES = {"fwd": "forward", "fwd_bwd": "forward + backward"}
_MANY = 14  # cases in one figure


def _layers(rows: Sequence[Record]) -> list[Record]:
    return [row for row in rows if row["op"] in OPS and row["ratio_to_frozen"] is not None]


def _mode(mode: str) -> str:
    words = PASSES.get(mode.removesuffix("_graph"), mode)
    return f"{words}, CUDA graph" if mode.endswith("_graph") else words


def _case(row: Record) -> str:
    op = {"lora_linear": "", "lora_linear_stacked": "", "lora_mlp": "MLP "}[row["op"]]
    return f"{op}M{row['M']} N{row['N']} K{row['K']}\nr={row['r']} p={row['dropout']:g} {row['dtype']}"


def ratio_cases(rows: Sequence[Record], mode: str) -> Drawn:
    """A line a case: every contender's time in times of the frozen layer, bars from the 20th to the 80th percentile."""
    rows = [row for row in _layers(rows) if row["mode"] == mode]
    cases = list(dict.fromkeys(_case(row) for row in rows))[:_MANY]
    if not cases:
        return None
    figure, grid = new_figure(8, 1.6 + 0.55 * len(cases))
    axes = grid[0, 0]
    present = ordered([series_of(row) for row in rows])
    offsets = {name: 0.7 * ((i + 0.5) / len(present) - 0.5) for i, name in enumerate(present)}
    for row in (row for row in rows if _case(row) in cases and row["implementation"] != "frozen linear"):
        name = series_of(row)
        look, ratio, scale = look_of(name), row["ratio_to_frozen"], row["ratio_to_frozen"] / row["ms_p50"]
        ends = [[scale * (row["ms_p50"] - row["ms_p20"])], [scale * (row["ms_p80"] - row["ms_p50"])]]
        axes.errorbar(
            ratio, cases.index(_case(row)) + offsets[name], xerr=ends, fmt=look.marker, color=look.color,
            markersize=8 if look.front else 6, elinewidth=1, zorder=4 if look.front else 3, label=name,
        )  # fmt: skip
    axes.axvline(1, color=BLACK, linewidth=1)
    axes.annotate("frozen layer", (1, 0), xycoords=("data", "axes fraction"), xytext=(3, 3), textcoords="offset points",
                  fontsize=7)  # fmt: skip
    axes.set_yticks(range(len(cases)), cases, fontsize=7)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlabel("time / frozen layer's time (median; bars: 20th to 80th percentile; less is better)", fontsize=8)
    ratio_scale(axes.xaxis, [row["ratio_to_frozen"] for row in rows if _case(row) in cases])
    axes.grid(visible=False, axis="y")
    for edge in range(1, len(cases)):
        axes.axhline(edge - 0.5, color="#DDDDDD", linewidth=0.6)
    legend(axes, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure, f"A LoRA layer in times of its frozen layer: {_mode(mode)}"


def ratio_over(rows: Sequence[Record], variable: str, mode: str) -> Drawn:
    """Ratio to the frozen layer over M or r, one panel a shape that was measured at two values or more."""
    shapes: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    fixed = [name for name in ("op", "M", "N", "K", "r", "dropout", "dtype") if name != variable]
    for row in _layers(rows):
        if row["mode"] == mode:
            shapes[tuple(row[name] for name in fixed)].append(row)
    counts = {key: len({row[variable] for row in group}) for key, group in shapes.items()}
    if not counts or max(counts.values()) < 2:
        return None
    enough = min(3, max(counts.values()))  # a line through two values says little beside one through six
    keys = sorted((key for key in shapes if counts[key] >= enough), key=lambda key: -counts[key])[:4]
    panels = [shapes[key] for key in keys]
    figure, grid = new_figure(4.6 * min(2, len(panels)) + 1.6, 3.6 * -(-len(panels) // 2) + 0.6, -(-len(panels) // 2),
                              min(2, len(panels)), sharey=True)  # fmt: skip
    for axes, group in zip(grid.flat, panels, strict=False):
        for name in ordered([series_of(row) for row in group]):
            own = sorted((row for row in group if series_of(row) == name), key=lambda row: row[variable])
            look = look_of(name)
            axes.plot(
                [row[variable] for row in own], [row["ratio_to_frozen"] for row in own], color=look.color,
                marker=look.marker, linestyle=look.line, linewidth=2.4 if look.front else 1.2, markersize=5, label=name,
                zorder=4 if look.front else 3,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        ticks = sorted({row[variable] for row in group})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        first = group[0]
        text = ", ".join(f"{name}={first[name]:g}" for name in ("M", "K", "r") if name != variable)
        axes.set_title(f"N={first['N']}, {text}, dropout {first['dropout']:g}, {first['dtype']}", fontsize=8)
        axes.set_xlabel("rows M of X" if variable == "M" else "rank r", fontsize=8)
        axes.set_ylabel("time / frozen layer", fontsize=8)
    for axes in grid.flat:
        axes.set_visible(axes.has_data())
        ratio_scale(axes.yaxis, [row["ratio_to_frozen"] for group in panels for row in group])
    legend(grid[0, min(2, len(panels)) - 1], loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure, f"Over {'the rows of X' if variable == 'M' else 'the rank'}: {_mode(mode)}"


def roofline(rows: Sequence[Record], mode: str, ceilings: Ceilings | None = None) -> Drawn:
    """Rate over arithmetic intensity of every contender, under what this machine's copies and products reach."""
    rows = [row for row in _layers(rows) if row["mode"] == mode and row["tflops"]]
    if not rows:
        return None
    figure, grid = new_figure(8, 4.6)
    axes = grid[0, 0]
    intensities = []
    for row in sorted(rows, key=lambda row: look_of(series_of(row)).front):
        work = passes(case_of(row), mode, lora=not row["implementation"].startswith("frozen"))
        intensity = sum(part.flop for part in work) / sum(part.bytes for part in work)
        intensities.append(intensity)
        look = look_of(series_of(row))
        axes.plot(intensity, row["tflops"], look.marker, color=look.color, markersize=7 if look.front else 5,
                  label=series_of(row))  # fmt: skip
    low, high = min(intensities) / 2, max(intensities) * 2
    dtypes = sorted({row["dtype"] for row in rows})
    if ceilings is not None and all(dtype in ceilings.tflops for dtype in dtypes):
        low = min(low, *(250 * ceilings.tflops[dtype] / ceilings.gbps for dtype in dtypes))  # the slope is seen, too
        xs = [low * (high / low) ** (i / 100) for i in range(101)]
        for dtype in dtypes:
            roof = [min(ceilings.tflops[dtype], x * ceilings.gbps / 1e3) for x in xs]
            axes.plot(xs, roof, color=BLACK, linewidth=1.4)
            rates = f"{dtype}: {ceilings.tflops[dtype]:.3g} TFLOP/s, {ceilings.gbps:,.0f} GB/s"
            ridge = 1e3 * ceilings.tflops[dtype] / ceilings.gbps
            axes.annotate(rates, (ridge, roof[-1]), xytext=(4, 4), textcoords="offset points", fontsize=7)
    else:
        peak = max(row["tflops"] * 100 / row["pct_of_bound"] for row in rows)
        axes.axhline(peak, color=BLACK, linewidth=1.4)
        axes.annotate(f"bound of these rows: {peak:.3g} TFLOP/s", (high, peak), xytext=(-4, 4),
                      textcoords="offset points", ha="right", fontsize=7)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("FLOP / byte, every operand read once and every result written once", fontsize=8)
    axes.set_ylabel("TFLOP/s", fontsize=8)
    legend(axes, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure, f"Roofline: {_mode(mode)}"


def memory(rows: Sequence[Record]) -> Drawn:
    """What a layer keeps between forward and backward, and holds at its peak where that was measured."""
    plans = {f"{OURS} {plan}" for plan in PLANS + OPT_IN}  # they keep what lora_kernels keeps
    rows = [row for row in rows if row["op"] in OPS and row["mode"] == "fwd_bwd" and row["saved_mib"] is not None]
    rows = [row for row in rows if series_of(row) not in plans]
    columns = [name for name in ("saved_mib", "peak_mib") if any(row[name] is not None for row in rows)]
    cases = list(dict.fromkeys(_case(row) for row in rows))[:4]
    if not cases or not columns:
        return None
    names = ordered([series_of(row) for row in rows])
    figure, grid = new_figure(
        4.2 * len(columns) + 2.2, 1.2 + 0.22 * len(names) * len(cases), 1, len(columns), sharey=True
    )
    for axes, column in zip(grid.flat, columns, strict=True):
        for number, case in enumerate(cases):
            own = {series_of(row): row for row in rows if _case(row) == case}
            for place, name in enumerate(names):
                if name in own and own[name][column] is not None:
                    where, value = number + 0.85 * ((place + 0.5) / len(names) - 0.5), own[name][column]
                    hatch = "////" if "fp32" in name or "separate" in name else None
                    axes.barh(where, value, 0.8 / len(names), color=look_of(name).color, label=name, hatch=hatch,
                              edgecolor="white", linewidth=0)  # fmt: skip
                    axes.annotate(f"{value:.3g}", (value, where), xytext=(2, 0), textcoords="offset points", fontsize=6,
                                  va="center")  # fmt: skip
        axes.set_ylim(len(cases) - 0.5, -0.5)
        axes.set_yticks(range(len(cases)), cases, fontsize=7)
        axes.grid(visible=False, axis="y")
        text = {"saved_mib": "kept for the backward beside the parameters", "peak_mib": "held at the peak of a step"}
        axes.set_xlabel(f"MiB {text[column]}", fontsize=8)
    legend(grid[0, -1], loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure, "Memory of one layer, forward + backward"
