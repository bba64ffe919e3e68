"""Run each example as a user would, with few steps and without a network; check the output that its page claims."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_kernels.finetune.data.movies import TEXT, cache_folder
from lora_kernels.finetune.tasks.pretrained import SMOLLM2, load_tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"
PAGE = Path(__file__).parent.parent / "docs" / "examples.md"
FILM = pytest.mark.skipif(not (cache_folder() / TEXT).exists(), reason="the film reviews are not in the cache")


SKILLS = ("passive", "json", "question")  # of serve_adapters


def run(name, out, *arguments):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--out", str(out), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def numbers(pattern, text):
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not in:\n{text}"
    return [float(group) for group in found.groups()]


@pytest.mark.slow
def test_text_classification(tmp_path):
    said = run("text_classification", tmp_path, "--steps", "25", "--per-class", "60")
    (before,), (after,) = (numbers(rf"accuracy {when} the training ([\d.]+)", said) for when in ("before", "after"))
    assert after > before + 0.1
    assert "classifier: trained whole and saved with the adapter" in said
    assert len(re.findall(r" -> \w+ \(it is \w+\)", said)) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


@FILM
@pytest.mark.slow
def test_sentiment_analysis(tmp_path):
    said = run("sentiment_analysis", tmp_path, "--steps", "60", "--test-rows", "128")
    (before,), (after,) = (numbers(rf"accuracy {when} the training ([\d.]+)", said) for when in ("before", "after"))
    assert after > before + 0.1
    assert "37 of 37 PEFT LoRA layers fused" in said
    assert re.search(r"'I hate programming' -> (positive|negative) \(0\.\d+\)", said)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_machine_translation(tmp_path):
    said = run("machine_translation", tmp_path, "--pretrain-steps", "150", "--steps", "60", "--test-rows", "50")
    (before,) = numbers(r"BLEU of subordinate clauses ([\d.]+)", said)
    (after,) = numbers(r"BLEU of subordinate clauses after LoRA ([\d.]+)", said)
    assert after > before + 10
    (main,), (again,) = numbers(r"BLEU of new main clauses ([\d.]+)", said), numbers(r"as before ([\d.]+)", said)
    assert main == again
    assert "32 of 32 PEFT LoRA layers fused" in said


@pytest.fixture
def tiny_llama(tmp_path):
    """Make a folder with an untrained Llama of two layers and SmolLM2's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer(SMOLLM2)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.slow
def test_serve_adapters(tmp_path, tiny_llama):
    out = tmp_path / "out"
    said = run("serve_adapters", out, "--model", str(tiny_llama), "--steps", "20", "--sentences", "3")
    assert "12 of 12 rows of the mixed batch are PEFT's for that request alone, token for token" in said
    answers = [re.findall(rf"^ *{name}: the .*? -> (.*)", said, re.MULTILINE) for name in (*SKILLS, "None")]
    assert [len(each) for each in answers] == [2] * 4
    assert len(set(map(tuple, answers))) == 4  # the outputs of all adapters and of the base differ
    for skill, rank in zip(SKILLS, (16, 4, 8), strict=True):
        config = json.loads((out / skill / "adapter" / "adapter_config.json").read_text())
        assert config["r"] == rank
    again = run("serve_adapters", out, "--model", str(tiny_llama), "--sentences", "1")
    assert "lora-kernels train" not in again  # existing adapters are not trained again


@FILM
@pytest.mark.slow
def test_causal_lm(tmp_path):
    said = run("causal_lm", tmp_path, "--steps", "4", "--test-blocks", "8", "--batch-size", "2")
    (before,), (after,) = (numbers(rf"perplexity {when} ([\d.]+)", said) for when in ("before", "after"))
    assert after < before
    assert "210 of 210 PEFT LoRA layers fused" in said
    assert "sample after: 'the film is" in said


def test_examples_are_short_and_have_their_output_on_the_page():
    names = sorted(path.stem for path in EXAMPLES.glob("*.py"))
    assert names == ["causal_lm", "machine_translation", "sentiment_analysis", "serve_adapters", "text_classification"]
    page = PAGE.read_text()
    for name in names:
        source = (EXAMPLES / f"{name}.py").read_text()
        assert len(source.splitlines()) <= 120
        assert f"examples/{name}.py" in page
        claim = re.search(r"print\(f\"((?:accuracy|perplexity|BLEU)[^{]*after[^{]*)\{", source)
        assert claim, name
        assert claim[1] in page, name
