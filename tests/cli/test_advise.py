import contextlib
import json

import pytest
from transformers import AutoConfig, BertConfig

from lora_kernels.cli import main
from lora_kernels.cli.advise import task_type_of
from lora_kernels.cli.shapes import configuration


def test_shows_what_fits(tiny_model, tmp_path, capsys):
    command = ["advise", str(tiny_model), "--r", "2", "4", "--tokens", "8", "--batch", "2", "--memory", "0.0001"]
    assert main([*command, "--json", str(tmp_path / "rows.json")]) == 0
    shown = capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())
    by_strategy = {(row["strategy"], row["targets"], row["r"]): row for row in rows}
    assert len(by_strategy) == 5 * 2 + 2
    assert by_strategy["LoRA", "q,v", 2]["trainable"] == 2 * 2 * 2 * (16 + 16) + 2 * 16 + 2
    lines = [line.split() for line in shown.splitlines()]
    assert lines[0][5:9] == ["SEQ_CLS;", "batches", "of", "2"]
    fits = {(line[0], line[1], line[2]): line[-2] for line in lines if line[:1] == ["LoRA"]}
    for (name, targets, r), row in by_strategy.items():
        if name == "LoRA":
            assert fits[name, targets, str(r)] == ("yes" if row["memory"] <= 0.0001 * 2**30 else "no")
    assert set(fits.values()) == {"yes"}
    assert next(line for line in lines if line[:1] == ["full"])[-2] == "no"
    assert "  q,v: query,value" in shown
    assert "arXiv 2106.09685" in shown


@pytest.mark.slow
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
        ("MODEL", "--tokens is 128; this model takes sequences of at most 32"),
    ],
)
def test_mistakes_are_one_clear_line(tiny_model, capsys, words, message):
    assert main(["advise", *words.replace("MODEL", str(tiny_model)).split()]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--r 0", "argument --r: '0' was given"),
        ("--r", "argument --r: expected at least one argument"),
        ("--memory nan", "argument --memory: 'nan' was given"),
        ("--tokens -1", "argument --tokens: '-1' was given"),
        ("--batch 0", "argument --batch: '0' was given"),
        ("--json /dev/null/rows", "argument --json: '/dev/null/rows' was given"),
    ],
)
def test_values_are_refused_by_the_parser(tiny_model, capsys, change, message):
    with pytest.raises(SystemExit) as stopped:
        main(["advise", str(tiny_model), *change.split()])
    assert stopped.value.code == 2
    assert f"lora-kernels advise: error: {message}" in capsys.readouterr().err


BROKEN = [
    '{"hidden_size": -1}', '{"hidden_size": 0}', '{"hidden_size": "abc"}', '{"num_attention_heads": 0}',
    '{"num_attention_heads": 3}', '{"num_hidden_layers": 1000000000}', '{"vocab_size": 100000000000000000000}',
    '{"vocab_size": 0}', '{"hidden_act": "nope"}', '{"model_type": 5}', '{"num_labels": 100000000}', '{"dtype": "f99"}',
    '{"id2label": {"a": "b"}}', '{"hidden_dropout_prob": 7}', "[]", "null", "{", "{}", "1", '"x"', "[" * 100_000,
    "\xff",
]  # fmt: skip


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_configuration_is_one_sentence(tiny_model, tmp_path, capsys, text):
    """Wrong values in an otherwise valid config.json, and files without a configuration."""
    file = tmp_path / "config.json"
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(change := json.loads(text), dict) and change:
            text = json.dumps(json.loads((tiny_model / "config.json").read_text()) | change)
    file.write_text(text, encoding="latin-1")
    for model in (file, tmp_path):
        assert main(["advise", str(model), "--r", "2", "--tokens", "4"]) == 2
        shown = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[transformers]")]
        assert [line.startswith(f"lora-kernels advise: '{model}'") for line in shown] == [True]
