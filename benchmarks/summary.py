"""The short table a round or a benchmark ends with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from benchmarks import serving_lines
from benchmarks.cases import DTYPE_NAMES, OPS, TARGETS
from benchmarks.rows import REHEARSAL, Record

OURS = "lora_kernels"


def summary(rows: Sequence[Record], checks: Sequence[Record], phases: Sequence[Record] = ()) -> str:
    """What a reader needs, the longest part first: cases as ratios to the frozen layer, g, targets, rivals, checks."""
    some = next(iter([*rows, *checks]), None)
    if some is None:
        return "nothing was measured"
    lines = ["", *table(rows), *_gemm(rows), *_steps(rows), *_targets(rows), *_against_rivals(rows), *_checks(checks)]
    lines += serving_lines.lines(rows)
    lines += [
        f"phase {phase['phase']} {phase['status']}: {phase['done']} of {phase['units']} units. {phase['detail']}"
        for phase in phases
        if phase["status"] not in ("done", "done before")
    ]
    lines.append(f"{some['gpu']}, torch {some['torch']}, triton {some['triton']}, commit {some['commit']}")
    if some["gpu"] == REHEARSAL:
        lines.append("REHEARSAL: every time and ratio above is made up")
    return "\n".join(lines)


def _checks(checks: Sequence[Record]) -> list[str]:
    counts = Counter(check["status"] for check in checks)
    lines = ["checks: " + ", ".join(f"{counts[status]} {status}" for status in ("ok", "failed", "refused", "not run"))]
    failed = [check for check in checks if check["status"] == "failed"]
    for check in failed[:8]:
        where = f"{check['check']} {check['implementation']} {_shape(check)} {check['what']}"
        lines.append(f"  FAILED {where}: {check['message'][:160]}")
    return [*lines, f"  and {len(failed) - 8} more, in checks.csv"] if len(failed) > 8 else lines


def _shape(row: Record) -> str:
    return f"M{row['M']} N{row['N']} K{row['K']} r{row['r']} p{row['dropout']:g} {row['dtype']}"


def _gemm(rows: Sequence[Record]) -> list[str]:
    lines = []
    for row in rows:
        if row["op"].startswith("gemm") and row["plan"]:
            shape = f"{row['M']}x{row['N']}x{row['K']} r{row['r']}"
            lines.append(
                f"g {row['op']} {shape}: {row['ratio_to_frozen']:.3f} ({row['implementation']}, {row['plan']})"
            )
    return lines


def _steps(rows: Sequence[Record]) -> list[str]:
    """Whole steps of PEFT's models, accelerated, in PEFT's time and memory."""
    lines = []
    kept = {(row["op"], row["dropout"]): row["saved_mib"] for row in rows if row["implementation"] == "peft"}
    for row in rows:
        if row["op"].startswith("step_") and row["implementation"] != "peft":
            memory = row["saved_mib"] / kept[row["op"], row["dropout"]]
            lines.append(
                f"{row['op']} {_shape(row)}: {row['implementation']} {row['ratio_to_best_rival']:.3f} of PEFT's time, "
                f"{memory:.3f} of what it saves for the backward"
            )
    return lines


def _name(row: Record) -> str:
    if not row["implementation"].startswith(OURS):
        return row["implementation"]
    plan = row["plan"].partition(" ")[0]
    return (plan + row["implementation"].removeprefix(OURS)).strip()


def table(rows: Sequence[Record]) -> list[str]:
    """One line a case and mode: the frozen layer's time, then every implementation as a ratio to it, fastest first."""
    cases: dict[tuple[str, str], list[Record]] = {}
    for row in rows:
        if row["op"] in OPS:
            head = "" if row["op"] == "lora_linear" else f"{row['op']} "
            cases.setdefault((head + row["mode"], _shape(row)), []).append(row)
    lines = []
    for (mode, shape), group in cases.items():
        frozen = next((row["ms_p50"] for row in group if row["implementation"] == "frozen linear"), None)
        ratios: dict[str, float] = {}  # the compiled rival is measured in a run of its own, beside its own frozen layer
        for row in group:
            if row["implementation"] != "frozen linear" and row["ratio_to_frozen"] is not None:
                ratios.setdefault(_name(row), row["ratio_to_frozen"])
        shown = ", ".join(f"{name} {ratio:.3f}" for name, ratio in sorted(ratios.items(), key=lambda item: item[1]))
        lines.append(
            f"{mode} {shape}: frozen {frozen:.4g} ms; x {shown}" if frozen else f"{mode} {shape}: no frozen time"
        )
    return lines


def _own_choice(rows: Sequence[Record]) -> list[Record]:
    """Rows of what the planner chose by itself."""
    return [row for row in rows if row["implementation"] == OURS and row["plan"].startswith(("auto", "reference"))]


def _targets(rows: Sequence[Record]) -> list[str]:
    lines = []
    for target in TARGETS:
        case = target.case
        key = (target.mode, DTYPE_NAMES[case.dtype], case.M, case.N, case.K, case.r, case.p)
        for row in _own_choice(rows):
            if row["op"] == case.op and key == tuple(row[c] for c in ("mode", "dtype", "M", "N", "K", "r", "dropout")):
                ratio = row["ratio_to_frozen"]
                word = "aim met" if ratio <= target.aim else "met" if ratio <= target.must else "MISSED"
                lines.append(f"target {target.mode} {case}: {ratio:.3f}, must {target.must}, aim {target.aim}: {word}")
                break
    return lines


def _against_rivals(rows: Sequence[Record]) -> list[str]:
    judged = [row for row in _own_choice(rows) if row["ratio_to_best_rival"] is not None]
    if not judged:
        return []
    slower = [row for row in judged if row["ratio_to_best_rival"] > 1]
    worst = max(judged, key=lambda row: row["ratio_to_best_rival"])
    return [
        f"against the best rival of the same run: slower on {len(slower)} of {len(judged)} cases, "
        f"worst {worst['ratio_to_best_rival']:.3f} ({worst['mode']} {_shape(worst)})"
    ]
