import pytest

from lora_kernels.check.compat import table
from lora_kernels.check.compat.cells import Cell
from lora_kernels.errors import ConfigError

FOUND = [
    Cell("train", "BERT", "fused", (), 4, 4),
    Cell("train", "GPT-2", "fused", (), 4, 4),
    Cell("merge", "BERT", "partly", ("merged",), 4, 8),
    Cell("merge", "GPT-2", "WRONG", ("error is 5x",), 4, 8),
    Cell("4-bit", "BERT", "PEFT", ("no fused path", "merged")),
    Cell("4-bit", "GPT-2", "-", ("PEFT: TypeError: no",)),
]

GROUPS = {"BERT": ("query + key + value",), "GPT-2": ()}


def test_the_page_has_every_cell_and_its_reasons_as_notes():
    lines = table.page(FOUND, GROUPS).splitlines()
    assert "| | BERT | GPT-2 |" in lines
    assert "| train | fused | fused |" in lines
    assert "| merge | partly a | **WRONG** b |" in lines
    assert "| 4-bit | PEFT c a | - d |" in lines
    assert "| layers of one input, in one call | query + key + value | - |" in lines
    assert lines[-4:] == ["- a: merged", "- b: error is 5x", "- c: no fused path", "- d: PEFT: TypeError: no"]
    assert "- **WRONG**, 1 cells: the result is not PEFT's" in lines


def test_in_short_families_of_one_outcome_stand_together():
    lines = table.short(FOUND, GROUPS).splitlines()
    assert lines[2] == "| train | all |  |"
    assert lines[3] == (
        "| merge | BERT | BERT: PEFT's own forward in part: merged. GPT-2: WRONG: error is 5x |"
    )  # fmt: skip
    assert lines[4].startswith("| 4-bit | none | BERT: PEFT's own forward: no fused path; merged. GPT-2: not there")


def test_layers_of_one_input_are_named_once():
    assert table.together("Llama") == ("q_proj + k_proj + v_proj", "gate_proj + up_proj + down_proj")
    assert table.together("GPT-2") == ()


def test_names_or_parts_of_them_are_enough():
    families, features = table.chosen("bert; llama", "merge_a")
    assert families == ["BERT", "Llama"]
    assert features == ["add_weighted_adapter", "merge_adapter, unmerge_adapter", "merge_and_unload"][1:]
    assert len(table.chosen("", "")[0]) >= 15
    with pytest.raises(ConfigError, match="family 'Bart' is unknown; known are BERT; "):
        table.chosen("Bart", "")


def test_cells_come_one_at_a_time():
    cells = table.cells(["GPT-2"], ["rsLoRA"])
    assert table.line(next(cells)) == "fused   16/16  GPT-2: rsLoRA"
