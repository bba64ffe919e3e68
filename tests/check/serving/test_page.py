"""The code of docs/serving.md runs as it stands, in its order."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "serving.md"


def test_the_pages_code_runs():
    text = PAGE.read_text()
    blocks = list(re.finditer(r"```python\n(.*?)```", text, re.DOTALL))
    assert len(blocks) >= 6
    names: dict[str, object] = {}
    for block in blocks:
        first = text.count("\n", 0, block.start(1))  # a failure names the page's own line
        exec(compile("\n" * first + block[1], str(PAGE), "exec"), names)
