"""How every figure looks: colours that the colour-blind tell apart (Okabe and Ito), one a contender, a caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.rows import Record

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#B8A800", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GREY = "#777777"
OURS = "lora_kernels"


@dataclass(frozen=True)
class Look:
    """Colour, marker and line of a series; ``front``: drawn last and thick."""

    color: str
    marker: str
    line: str = "-"
    front: bool = False


LOOKS = {
    "frozen linear": Look(BLACK, "_", ":"),
    "frozen stacked linear": Look(GREY, "_", ":"),
    "lora_kernels": Look(BLUE, "o", "-", front=True),
    "lora_kernels accelerated": Look(BLUE, "o", "-", front=True),
    "lora_kernels accelerated, group=False": Look(SKY, "h", "--"),
    "lora_kernels fp32 adapters": Look(BLUE, "h", ":"),
    "lora_kernels separate layers": Look(SKY, "h", "--"),
    "lora_kernels eager": Look(SKY, "v", "--"),
    "lora_kernels shrink_extend": Look(SKY, "s", "--"),
    "lora_kernels one_pass": Look(SKY, "D", "--"),
    "lora_kernels tma_extend": Look(YELLOW, "<", "-."),
    "lora_kernels one_launch": Look(YELLOW, ">", "-."),
    "lora_kernels gluon_extend": Look(PURPLE, "<", "-."),
    "lora_kernels gluon_one_launch": Look(PURPLE, ">", "-."),
    "lora_kernels ptr_one_launch": Look(GREY, ">", "-."),
    "peft": Look(VERMILION, "X"),
    "peft fp32 adapters": Look(VERMILION, "x", "--"),
    "peft torch.compile": Look(ORANGE, "P"),
    "peft, rows reversed": Look(GREY, "x", ":"),
    "peft, rows rotated": Look(BLACK, "x", ":"),
    "addmm chain": Look(GREEN, "^"),
    "in-flight merge": Look(PURPLE, "*"),
}
_OTHERS = (Look(SKY, "p", "-."), Look(YELLOW, "p", "-."), Look(GREY, "p", "-."), Look(PURPLE, "8", "-."))


def series_of(row: Record) -> str:
    """The series a row belongs to: its contender, of ours with the plan where one was named."""
    plan = str(row["plan"]).partition(" ")[0]
    named = row["implementation"] == OURS and plan not in ("", "auto", "reference", "default")
    return f"{OURS} {plan}" if named else str(row["implementation"])


def look_of(series: str) -> Look:
    """The series' look, the same in every figure."""
    return LOOKS.get(series) or _OTHERS[sum(map(ord, series)) % len(_OTHERS)]


def ordered(series: Sequence[str]) -> list[str]:
    """In the order of LOOKS, others after them."""
    known = list(LOOKS)
    return sorted(set(series), key=lambda name: (known.index(name) if name in known else len(known), name))


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **grid: Any) -> tuple[Figure, Any]:
    """A figure of width x height inches and its axes (rows, columns), without pyplot and its global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **grid)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(visible=True, color="#DDDDDD", linewidth=0.6)
        one.set_axisbelow(True)
        one.tick_params(labelsize=8)
    return figure, axes


def caption_of(rows: Sequence[Record]) -> str:
    """Where, with what and when the rows were taken."""
    kept = {
        name: ", ".join(dict.fromkeys(str(row[name]) for row in rows if row[name]))
        for name in ("gpu", "driver", "cuda", "torch", "triton", "commit")
    }
    dates = sorted({str(row["date"])[:10] for row in rows})
    parts = [kept["gpu"]] + [f"{name} {kept[name]}" for name in list(kept)[1:] if kept[name]]
    return "; ".join([*parts, " to ".join(dict.fromkeys([dates[0], dates[-1]]))])


def ratio_scale(axis: Any, ratios: Sequence[float]) -> None:
    """A logarithmic axis for ``ratios`` and 1, with ticks where a reader looks for them."""
    highest, lowest = max(1.0, *ratios), min(1.0, *ratios)
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    ticks = [
        tick
        for tick in (0.5, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.5, 2, 3, 4, 6, 8, 12)
        if 0.9 * lowest <= tick <= 1.1 * highest
    ]
    if highest > 2.5:
        ticks = [tick for tick in ticks if tick not in (0.9, 1.1, 1.3)]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_minor_locator(NullLocator())
    axis.axes.set(**{f"{axis.axis_name}lim": (0.95 * lowest, 1.06 * highest)})


def legend(axes: Any, **how: Any) -> None:
    """A legend without repetitions, in the order of LOOKS."""
    handles, labels = axes.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    names = ordered(list(by_label))
    axes.legend([by_label[name] for name in names], names, fontsize=7, frameon=False, **how)


def save(figure: Figure, title: str, caption: str, out: Path, name: str) -> list[Path]:
    """Write NAME.png and NAME.svg with a title above and the caption below."""
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, horizontalalignment="left")
    width = max(60, int(figure.get_figwidth() * 15))
    figure.supxlabel(_wrapped(caption, width), fontsize=6.5, color="#444444", x=0.01, horizontalalignment="left")
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.{kind}" for kind in ("png", "svg")]
    figure.savefig(paths[0], dpi=150)
    figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _wrapped(text: str, width: int) -> str:
    lines, line = [], ""
    for word in text.split(" "):
        if len(line) + len(word) > width:
            lines.append(line)
            line = ""
        line += ("" if not line else " ") + word
    return "\n".join([*lines, line])
