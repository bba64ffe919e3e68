"""The code of docs/pool.md runs as it stands, in its order, and prints what the page says."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "pool.md"


def test_the_pages_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text()
    blocks = list(re.finditer(r"```python\n(.*?)```", text, re.DOTALL))
    assert len(blocks) == 5
    names: dict[str, object] = {}
    for block in blocks:
        first = text.count("\n", 0, block.start(1))  # a failure names the page's own line
        exec(compile("\n" * first + block[1], str(PAGE), "exec"), names)
    table = re.search(r"```\n(AdapterPool.*?)```", text, re.DOTALL)
    assert table
    printed = capsys.readouterr().out
    assert table[1] in printed
    said = re.search(r"print\(error\)  # (.*)", text)
    assert said
    assert f"{said[1]}\n" in printed
