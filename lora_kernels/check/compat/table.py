"""Writes the compatibility table, every feature on every family: as lines, as a page, and in short for a README."""

from __future__ import annotations

import importlib.metadata
import string
from collections.abc import Iterator, Mapping, Sequence

from lora_kernels.check.compat.cells import ABSENT, FUSED, PARTLY, PEFT, REFUSED, WRONG, Cell, try_cell
from lora_kernels.check.compat.families import FAMILIES
from lora_kernels.check.compat.features import FEATURES
from lora_kernels.check.compat.stage import Stage
from lora_kernels.errors import ConfigError
from lora_kernels.integrations.peft.groups import groups_of
from lora_kernels.integrations.peft.mlp import mlps_of

LIBRARIES = ("torch", "peft", "transformers")
WORDS = {
    FUSED: "every call of a LoRA layer ran fused",
    PARTLY: "fused, but for the calls that the note names: PEFT's own forward ran these",
    PEFT: "PEFT's own forward ran, for the reason in the note",
    REFUSED: "an error that says why",
    ABSENT: "PEFT or the family does not have it, see the note",
    WRONG: "the result is not PEFT's",
}


def chosen(families: str, features: str) -> tuple[list[str], list[str]]:
    """Return the names of families and of features: "" for all, else names or parts of names, separated by ";".

    Raises:
        ConfigError: a part is in no name.
    """
    return _matching("family", families, list(FAMILIES)), _matching("feature", features, list(FEATURES))


def _matching(kind: str, asked: str, known: list[str]) -> list[str]:
    if not asked:
        return known
    found: list[str] = []
    for part in (each.strip() for each in asked.split(";")):
        exact = [name for name in known if name.lower() == part.lower()]
        names = exact or [name for name in known if part.lower() in name.lower()]
        if not part or not names:
            raise ConfigError(f"{kind} {part!r} is unknown; known are {'; '.join(known)}")
        found += names
    return [name for name in known if name in found]


def cells(families: Sequence[str], features: Sequence[str]) -> Iterator[Cell]:
    """Yield one cell at a time, feature by feature."""
    for feature in features:
        for family in families:
            yield try_cell(FEATURES[feature], FAMILIES[family])


def together(family: str) -> tuple[str, ...]:
    """Return the layers of the family that run in one call after a step has shown their common input: "q + k + v"."""
    model, inputs = (stage := Stage(FAMILIES[family], accelerated=True)).build()
    stage.step(model, inputs)
    runs = dict.fromkeys(run for group in groups_of(model) for run in group.together())
    blocks = dict.fromkeys((names.gate, names.up, names.down) for names in mlps_of(model).values())
    return tuple(" + ".join(run) for run in (*runs, *blocks))


def line(cell: Cell) -> str:
    """Return a cell as one line of text."""
    count = f" {cell.fused}/{cell.calls}" if cell.calls else ""
    why = f" ({'; '.join(cell.reasons)})" if cell.reasons else ""
    return f"{cell.status:7}{count:7} {cell.family}: {cell.feature}{why}"


def versions() -> str:
    """Return the versions of the libraries."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)


def page(found: Sequence[Cell], groups: Mapping[str, Sequence[str]]) -> str:
    """Return docs/compatibility.md: a row per feature, a column per family, reasons as notes; ``groups`` by family."""
    families, rows = _columns(found), _rows(found)
    notes: dict[str, str] = {}
    body = []
    for feature, row in rows.items():
        shown = [_status(row[family], notes) if family in row else "" for family in families]
        body.append(f"| {feature} | {' | '.join(shown)} |")
    counts = {status: sum(cell.status == status for cell in found) for status in WORDS}
    lines = [
        "# Compatibility",
        "",
        "Written by `lora-kernels compat --markdown`. It builds each family small with random weights, adapts it with",
        "PEFT, fills the adapters so that the LoRA term is as large as the base's, runs the feature with PEFT, with",
        "PEFT in float64 and after `lora_kernels.accelerate`, and compares loss, logits and every gradient by the",
        "error rule (a 16-bit cell over 16 seeds, a float32 one over five where the first is beyond half of the",
        "limits). What ran is counted in the layers' forwards while it runs.",
        f"{versions()}; a CPU.",
        "",
        *(f"- **{status}**, {counts[status]} cells: {word}" for status, word in WORDS.items() if counts[status]),
        "",
        f"| | {' | '.join(families)} |",
        f"|---|{'---|' * len(families)}",
        *body,
        f"| layers of one input, in one call | {' | '.join(', '.join(groups.get(f, ())) or '-' for f in families)} |",
        "",
        *(f"- {letter}: {reason}" for reason, letter in notes.items()),
    ]
    return "\n".join(lines) + "\n"


def _status(cell: Cell, notes: dict[str, str]) -> str:
    word = f"**{cell.status}**" if cell.status in (WRONG, REFUSED) else cell.status
    letters = [notes.setdefault(reason, _letter(len(notes))) for reason in cell.reasons]
    return f"{word} {' '.join(letters)}".rstrip()


def _letter(number: int) -> str:
    letters = string.ascii_lowercase
    return (letters[number // len(letters) - 1] if number >= len(letters) else "") + letters[number % len(letters)]


def short(found: Sequence[Cell], groups: Mapping[str, Sequence[str]]) -> str:
    """Return the short table: a row per feature, with the families listed by result."""
    families, rows = _columns(found), _rows(found)
    lines = ["| PEFT feature | fused | otherwise |", "|---|---|---|"]
    for feature, row in rows.items():
        have = [family for family in families if family in row and row[family].status != ABSENT]
        fused = [family for family in have if row[family].status in (FUSED, PARTLY)]
        others: dict[str, list[str]] = {}
        for family in have:
            cell = row[family]
            if cell.status != FUSED:
                others.setdefault(f"{_SHORT[cell.status]}: {'; '.join(cell.reasons)}", []).append(family)
        if missing := [family for family in families if family in row and row[family].status == ABSENT]:
            others.setdefault("not there without us either", []).extend(missing)
        texts = [
            text if _all(who, families) == "all" else f"{_all(who, families)}: {text}" for text, who in others.items()
        ]
        lines.append(f"| {feature} | {_all(fused, families)} | {'. '.join(texts)} |")
    runs: dict[str, list[str]] = {}
    for family in families:
        runs.setdefault(", ".join(groups.get(family, ())), []).append(family)
    in_words = [f"{', '.join(who)}: {run}" for run, who in runs.items() if run]
    lines.append(f"| layers of one input compute together | {_all([f for f in families if groups.get(f)], families)} | "
                 f"{'. '.join(in_words)} |")  # fmt: skip
    return "\n".join([*lines, "", f"{len(found)} cells; {versions()}."])


_SHORT = {PARTLY: "PEFT's own forward in part", PEFT: "PEFT's own forward", REFUSED: "refused", WRONG: "WRONG"}


def _all(names: Sequence[str], families: Sequence[str]) -> str:
    """Return the names of families, or "all", "all but ..." or "none"."""
    if len(names) == len(families):
        return "all"
    left = [family for family in families if family not in names]
    return f"all but {', '.join(left)}" if names and len(left) < len(names) else ", ".join(names) or "none"


def _columns(found: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.family for cell in found))


def _rows(found: Sequence[Cell]) -> dict[str, dict[str, Cell]]:
    rows: dict[str, dict[str, Cell]] = {}
    for cell in found:
        rows.setdefault(cell.feature, {})[cell.family] = cell
    return rows
