"""Figures of result rows: ``python -m benchmarks.plot ROWS_OR_FOLDER... --out DIR``, each as PNG and as SVG.

    ratio_MODE        every case: each contender's time in times of the frozen layer
    ratio_MODE_over_M, ratio_MODE_over_r
                      the same over the rows of X and over the rank, where a shape was measured at several
    roofline_MODE     rate over arithmetic intensity     memory    bytes kept and held     overhead   the host's time
    waterfall         where the time over the frozen layer goes: predicted, and measured where rows exist
    whole_steps       PEFT's models accelerated: time of a step and bytes kept for its backward, in PEFT's
    training_MODEL    loss curves, their distance from PEFT's, tokens a second

What the rows hold nothing of is left out, and said. Rows of one machine at a time.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import figures, figures_runs
from benchmarks.curves import CURVE
from benchmarks.figures import Drawn
from benchmarks.roofline import Ceilings, ceilings_of
from benchmarks.rows import REHEARSAL, Record, read_rows
from benchmarks.style import caption_of, save
from benchmarks.waterfall import note, waterfall
from lora_kernels.finetune import values
from lora_kernels.planning.choose import OPT_IN, PLANS

NUMBERS = ("step", "loss", "difference", "allowed")


def read_curves(places: Sequence[Path]) -> list[Record]:
    """The points of every curves.csv in the folders."""
    points: list[Record] = []
    for path in [path for place in places if place.is_dir() for path in sorted(place.rglob("curves.csv"))]:
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                points.append(line | {name: float(line[name]) for name in NUMBERS})
    return points


def drawings(
    rows: Sequence[Record], points: Sequence[Record], ceilings: Ceilings | None
) -> Iterator[tuple[str, Drawn]]:
    """Every figure by its file's name, None where there is nothing to draw."""
    for mode in ("fwd", "fwd_bwd", "fwd_graph", "fwd_bwd_graph"):
        yield f"ratio_{mode}", figures.ratio_cases(rows, mode)
        for variable in ("M", "r"):
            yield f"ratio_{mode}_over_{variable}", figures.ratio_over(rows, variable, mode)
        yield f"roofline_{mode}", figures.roofline(rows, mode, ceilings)
    yield "memory", figures.memory(rows)
    yield "overhead", figures_runs.host_overhead(rows)
    yield "waterfall", waterfall(rows)
    yield "whole_steps", figures_runs.whole_steps(rows)
    for model in ("llama", "bert", "demo"):
        yield f"training_{model}", figures_runs.training(points, rows, model)


def plot(places: Sequence[Path], out: Path) -> dict[str, list[Path]]:
    """Draw all that ``places`` (CSV files or folders) hold; the files of each figure by its name.

    Raises:
        ValueError: no rows, rows of several machines, or rows without the columns.
    """
    rows = [row for place in places for row in read_rows(place)]
    points = read_curves(places)
    machines = sorted({str(row["gpu"]) for row in rows})
    if len(machines) != 1:
        raise ValueError(f"rows of {', '.join(machines) or 'no machine'}: name rows of one machine")
    caption = caption_of(rows) + ("; A REHEARSAL: every time is made up" if machines == [REHEARSAL] else "")
    assert CURVE[2:] == NUMBERS
    written = {}
    for name, drawn in drawings(rows, points, ceilings_of(rows)):
        if drawn is not None:
            said = caption
            if name == "waterfall":
                said = note() + (f". Measured: {caption}" if any(row["plan"] in PLANS + OPT_IN for row in rows) else "")
            written[name] = save(*drawn, said, out, name)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("places", type=Path, nargs="+", help="rows.csv, or folders with rows*.csv and curves.csv")
    parser.add_argument("--out", type=values.output_folder, required=True, help="folder for the figures")
    options = parser.parse_args(argv)
    try:
        written = plot(options.places, options.out)
    except ValueError as error:
        parser.error(str(error))
    for name, paths in written.items():
        print(f"{name}: {', '.join(str(path) for path in paths)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
