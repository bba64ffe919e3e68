import json

import pytest
import torch

from lora_kernels.cli import main
from lora_kernels.errors import ConfigError
from lora_kernels.finetune.data.files import DataError
from lora_kernels.finetune.tasks import CausalLM
from lora_kernels.finetune.tasks.pretrained import SMOLLM2
from lora_kernels.finetune.tasks.tokens import IGNORED


@pytest.fixture
def task(tiny_writer, alphabet):
    return CausalLM(model=str(tiny_writer), data=str(alphabet), max_length=20)


def test_the_text_is_cut_into_blocks(task):
    parts = task.splits
    text = task.tokenizer(task._text())["input_ids"]
    assert parts.train + parts.validation + parts.test == [text[i : i + 20] for i in range(0, 3200, 20)]
    assert [len(part) for part in (parts.train, parts.validation, parts.test)] == [128, 16, 16]
    assert task.describe_data().endswith("128 train, 16 validation, 16 test blocks of 20 tokens")
    assert len(CausalLM(model=task.model, data=task.data, max_length=20, limit=7).splits.train) == 7


def test_labels_are_the_tokens_that_follow(task):
    batch = next(iter(task.loader("test", 4)))
    ids, labels = batch["input_ids"], batch["labels"]
    assert ids.shape == labels.shape == batch["attention_mask"].shape == (4, 20)
    assert torch.equal(labels[:, :-1], ids[:, 1:])
    assert (labels[:, -1] == IGNORED).all()
    model = task.load_model()
    logits = model(ids).logits
    torch.testing.assert_close(task.criterion(logits, labels), model(ids, labels=ids).loss)


def test_train_command(task, tmp_path, capsys):
    words = f"train --task causal-lm --model {task.model} --data {task.data} --max-length 20 --epochs 6 --lr 0.01"
    more = f"--batch-size 8 --quiet --no-checkpoints --prompt c --new-tokens 5 --beside-peft --out {tmp_path}"
    assert main([*words.split(), *more.split()]) == 0
    shown = capsys.readouterr().out
    figures = json.loads((tmp_path / "metrics.json").read_text())
    test = figures["test"]
    assert test["perplexity"] < 2 < 10 < test["perplexity_before"]
    assert test["accuracy"] > 0.8
    assert test["sample"] == {"prompt": "c", "text": "d e f g h"}
    assert f"test perplexity {test['perplexity']:.2f}, before the training {test['perplexity_before']:.2f}" in shown
    assert "'c' -> 'd e f g h'" in shown
    assert figures["adapter"]["reloaded_max_difference"] == 0
    assert figures["adapter"]["compared"] == 16
    assert figures["settings"]["lora"]["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("change", [{"limit": -1}, {"max_length": 1}, {"new_tokens": -1}])
def test_nonsense_is_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        CausalLM(**change)


@pytest.mark.parametrize("change", [{"data": "missing.txt"}, {"held_out": 0.5}, {"max_length": 400}])
def test_data_that_does_not_do_is_refused(change, tiny_writer, alphabet):
    with pytest.raises(DataError):
        _ = CausalLM(**{"model": str(tiny_writer), "data": str(alphabet), **change}).splits


def test_the_packaged_model_is_named():
    assert CausalLM().model == SMOLLM2
