"""Rows of mixed batches in words: in times of the frozen layer, beside the targets, and beside PEFT's adapter_names."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.cases import DTYPE_NAMES
from benchmarks.rows import Record
from benchmarks.serving_cases import PEFT_LIMIT, TARGETS
from lora_kernels.check.serving.rivals import FROZEN, PEFT, PEFT_FP32

OP = "multi_lora_linear"
OURS = "lora_kernels"


def batch_of(row: Record) -> tuple[object, ...]:
    """What two rows of one batch share."""
    return tuple(row[name] for name in ("mode", "dtype", "M", "N", "K", "L", "ranks", "distribution", "sequence"))


def _shown(row: Record) -> str:
    return (
        f"{row['mode']} {row['dtype']} {row['M'] // row['sequence']}x{row['sequence']} tokens {row['K']}->{row['N']} "
        f"L{row['L']} r{row['ranks']} {row['distribution']}"
    )


def lines(rows: Sequence[Record]) -> list[str]:
    """The serving part of a summary: batches in times of the frozen layer, targets, and what PEFT takes."""
    batches: dict[tuple[object, ...], list[Record]] = {}
    for row in rows:
        if row["op"] == OP:
            batches.setdefault(batch_of(row), []).append(row)
    told: list[str] = []
    for group in batches.values():
        frozen = next((row["ms_p50"] for row in group if row["implementation"] == FROZEN.name), None)
        ratios: dict[str, float] = {}
        for row in group:
            if row["implementation"] != FROZEN.name and row["ratio_to_frozen"] is not None:
                ratios.setdefault(f"{row['implementation']} {row['plan']}".strip(), row["ratio_to_frozen"])
        shown = ", ".join(f"{name} {ratio:.3f}" for name, ratio in sorted(ratios.items(), key=lambda item: item[1]))
        told.append(f"{_shown(group[0])}: frozen {frozen or 0:.4g} ms; x {shown}")
    return [*told, *_targets(batches), *beside_peft(rows)]


def _own(group: Sequence[Record]) -> Record | None:
    """Of a batch's rows the planner's own choice."""
    return next((row for row in group if row["implementation"] == OURS and row["plan"].startswith("auto")), None)


def _targets(batches: dict[tuple[object, ...], list[Record]]) -> list[str]:
    told = []
    for target in TARGETS:
        case = target.case
        wanted = (target.mode, DTYPE_NAMES[case.dtype], case.M, case.N, case.K, case.L, case.ranks_shown)
        row = _own(batches.get((*wanted, case.distribution, case.sequence), ()))
        if row is not None:
            ratio = row["ratio_to_frozen"]
            word = "aim met" if ratio <= target.aim else "met" if ratio <= target.must else "MISSED"
            told.append(f"target {_shown(row)}: {ratio:.3f}, must {target.must}, aim {target.aim:.3f}: {word}")
    return told


def beside_peft(rows: Sequence[Record]) -> list[str]:
    """Ours over PEFT's adapter_names in the same run, and what the frozen layer alone is of it: nothing is below."""
    times: dict[tuple[object, ...], dict[str, Record]] = {}
    for row in rows:
        if row["op"] == OP and row["mode"] == "fwd" and row["plan"].partition(" ")[0] in ("", "auto", "reference"):
            times.setdefault(batch_of(row), {}).setdefault(row["implementation"], row)
    told = []
    for group in times.values():
        for peft in (PEFT.name, PEFT_FP32.name):
            if peft in group and OURS in group:
                mine, floor = (group[name]["ms_p50"] / group[peft]["ms_p50"] for name in (OURS, FROZEN.name))
                word = (
                    "within" if mine <= PEFT_LIMIT else "above" if floor <= PEFT_LIMIT else "above, as the frozen layer"
                )
                told.append(f"/ {peft}, {_shown(group[peft])}: {mine:.3f}, frozen {floor:.3f} ({word}: {PEFT_LIMIT})")
    return told
