import json

import pytest
from transformers import AutoConfig, BertConfig

from lora_kernels.cli import main
from lora_kernels.cli.advise import aligned, task_type_of
from lora_kernels.cli.shapes import configuration


def test_tells_what_fits(tiny_model, tmp_path, capsys):
    command = ["advise", str(tiny_model), "--r", "2", "4", "--tokens", "8", "--batch", "2", "--memory", "0.0001"]
    assert main([*command, "--json", str(tmp_path / "rows.json")]) == 0
    shown = capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())
    told = {(row["strategy"], row["targets"], row["r"]): row for row in rows}
    assert len(told) == 5 * 2 + 2
    assert told["LoRA", "q,v", 2]["trainable"] == 2 * 2 * 2 * (16 + 16) + 2 * 16 + 2
    lines = [line.split() for line in shown.splitlines()]
    assert lines[0][5:9] == ["SEQ_CLS;", "batches", "of", "2"]
    fits = {(line[0], line[1], line[2]): line[-2] for line in lines if line[:1] == ["LoRA"]}
    for (name, targets, r), row in told.items():
        if name == "LoRA":
            assert fits[name, targets, str(r)] == ("yes" if row["memory"] <= 0.0001 * 2**30 else "no")
    assert set(fits.values()) == {"yes"}
    assert next(line for line in lines if line[:1] == ["full"])[-2] == "no"
    assert "  q,v: query,value" in shown
    assert "arXiv 2106.09685" in shown


def test_half_the_bytes_in_half_the_dtype(tiny_model, tmp_path, capsys):
    weights = {}
    for dtype in ("float32", "bfloat16"):
        path = tmp_path / f"{dtype}.json"
        main(["advise", str(tiny_model), "--r", "2", "--tokens", "4", "--dtype", dtype, "--json", str(path)])
        rows = {row["strategy"]: row for row in json.loads(path.read_text())}
        weights[dtype] = rows["full"]["optimizer"]
        assert rows["LoRA"]["gradients"] >= 4 * (rows["LoRA"]["trainable"] - 34)  # adapters stay in float32
    assert weights["float32"] == 2 * weights["bfloat16"]


def test_the_task_that_an_architecture_is_for():
    assert task_type_of(BertConfig()) == "SEQ_CLS"
    assert task_type_of(configuration("llama-3-70b")) == "CAUSAL_LM"
    for name, kind in (("LlamaForCausalLM", "CAUSAL_LM"), ("GPT2LMHeadModel", "CAUSAL_LM"),
                       ("MarianMTModel", "SEQ_2_SEQ_LM"), ("BertForTokenClassification", "TOKEN_CLS"),
                       ("BertForSequenceClassification", "SEQ_CLS")):  # fmt: skip
        assert task_type_of(AutoConfig.for_model("bert", architectures=[name])) == kind


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("./missing", "there is no such file or folder"),
        ("MODEL --r 0", "--r is 0"),
        ("MODEL --memory 0", "--memory is 0.0; it must be above 0"),
        ("MODEL --tokens -1", "--tokens is -1"),
        ("MODEL", "--tokens is 128; this model takes sequences of at most 32"),
        ("MODEL --tokens 4 --r 2 --json /dev/null/rows", "Not a directory"),
    ],
)
def test_mistakes_are_one_clear_line(tiny_model, capsys, words, message):
    assert main(["advise", *words.replace("MODEL", str(tiny_model)).split()]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_numbers_flush_right():
    assert aligned([["name", "n"], ["a", "1,000"]], {0}) == "name      n\na     1,000"
