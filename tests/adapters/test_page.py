"""The code of docs/adapters.md runs as it stands, in its order, and prints what the page says."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"


def test_the_pages_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text()
    blocks = list(re.finditer(r"```python\n(.*?)```", text, re.DOTALL))
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        first = text.count("\n", 0, block.start(1))  # a failure names the page's own line
        exec(compile("\n" * first + block[1], str(PAGE), "exec"), names)
    said = re.search(r"prints\n\n```\n(.*?)```", text, re.DOTALL)
    assert said
    assert said[1] in capsys.readouterr().out
