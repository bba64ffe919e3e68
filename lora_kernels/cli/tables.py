"""Tables as text."""

from __future__ import annotations

from collections.abc import Container, Sequence


def aligned(rows: Sequence[Sequence[str]], left: Container[int] | None = None) -> str:
    """Format rows of cells as lines. Columns in ``left`` (None: all) are left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        padded = (cell.ljust(width) if left is None or i in left else cell.rjust(width) for i, (cell, width) in cells)
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
