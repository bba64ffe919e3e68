import pytest

from lora_kernels.check.compat import table
from lora_kernels.check.compat.cells import Cell
from lora_kernels.cli import compat, main

ASKED = ["--families", "GPT-2", "--features", "rsLoRA;disable_adapter"]


def test_a_small_part_is_run_and_written(tmp_path, capsys):
    readme, page = tmp_path / "README.md", tmp_path / "page.md"
    readme.write_text(f"before\n{compat.BEGIN}\nold\n{compat.END}\nafter\n")
    assert main(["compat", *ASKED, "--markdown", str(page), "--readme", str(readme)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "2 cells, 0 wrong"
    assert "| rsLoRA | fused |" in page.read_text()
    text = readme.read_text()
    assert text.startswith(f"before\n{compat.BEGIN}\n| PEFT feature |")
    assert text.endswith(f"\n{compat.END}\nafter\n")
    assert "old" not in text


def test_a_wrong_cell_is_shown_and_fails_the_command(monkeypatch, capsys):
    monkeypatch.setattr(table, "cells", lambda *_: [Cell("rsLoRA", "GPT-2", "WRONG", ("error is 5x",), 8, 8)])
    assert main(["compat", *ASKED]) == 1
    assert "WRONG   8/8    GPT-2: rsLoRA (error is 5x)" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--families", "Bart"], ["--readme", "{}"]])
def test_what_cannot_be_done_is_said_before_anything_runs(arguments, tmp_path, capsys):
    empty = tmp_path / "empty.md"
    empty.write_text("nothing")
    assert main(["compat", *(each.format(empty) for each in arguments)]) == 2
    assert "lora-kernels compat: " in capsys.readouterr().err
