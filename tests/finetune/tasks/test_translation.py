import csv
import json

import pytest
import torch

from lora_kernels.cli import main
from lora_kernels.errors import ConfigError
from lora_kernels.finetune.data.pairs import Pairs
from lora_kernels.finetune.data.phrases import phrases
from lora_kernels.finetune.tasks import Translation
from lora_kernels.finetune.tasks.tokens import IGNORED
from lora_kernels.finetune.tasks.translation import bleu


@pytest.fixture
def task(tiny_translator, tmp_path):
    pairs = phrases(300)
    with (tmp_path / "pairs.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(
            [("source", "target"), *zip(pairs.sources, pairs.targets, strict=True)]
        )
    return Translation(model=str(tiny_translator), data=str(tmp_path / "pairs.tsv"), limit=200)


def test_data(task):
    assert task.describe_data().endswith("200 train, 30 validation, 30 test sentence pairs")
    assert task.loader("train", 8).batch_sampler.shuffle
    assert not task.loader("test", 8).batch_sampler.shuffle
    parts = Translation(model=task.model, limit=50).splits
    assert [len(part) for part in (parts.train, parts.validation, parts.test)] == [50, 400, 400]


def test_batches_are_what_the_model_trains_on(task):
    rows = task.encode(
        Pairs(["the dog.", "the old dog sees the house."], ["der Hund.", "der alte Hund sieht das Haus."])
    )
    assert [ids[-1] for row in rows for ids in row] == [1] * 4
    batch = task.collate(rows)
    labels, behind = batch["labels"], batch["decoder_input_ids"]
    assert (labels[0] == IGNORED).sum() == 4
    assert (behind[:, 0] == 0).all()
    assert torch.equal(behind[1, 1:], labels[1, :-1])
    assert torch.equal(batch["attention_mask"].sum(1), torch.tensor([len(source) for source, _ in rows]))
    model = task.load_model().eval()
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    torch.testing.assert_close(task.criterion(model(**inputs).logits, labels), loss)


class Echo(torch.nn.Module):
    """Returns the source as its translation."""

    device = "cpu"

    def generate(self, input_ids, attention_mask, max_new_tokens, **greedy):
        assert not self.training
        assert greedy == {"num_beams": 1, "do_sample": False}
        return input_ids[:, :max_new_tokens]


def test_translations_come_in_order(task):
    sources = ["we know that the dog sees the house", "the cat", "the old dog knows the garden", "the horse"]
    assert task.translate(Echo(), sources, batch_size=2) == sources
    assert Translation(model=task.model, prefix="now ").translate(Echo(), sources[1:2]) == ["now the cat"]
    model = Echo()
    task.translate(model, sources)
    assert model.training


def test_padding_changes_no_translation(task):
    model, sources = task.load_model(), task.splits.test.sources[:5]
    together = task.translate(model, sources, batch_size=5)
    assert together == [task.translate(model, [source])[0] for source in sources]


def test_train_command(task, tmp_path, capsys):
    words = f"train --task translation --model {task.model} --data {task.data} --epochs 2 --lr 0.01 --batch-size 20"
    more = f"--limit 100 --quiet --no-checkpoints --beside-peft --max-length 20 --out {tmp_path}"
    assert main([*words.split(), *more.split()]) == 0
    shown = capsys.readouterr().out
    figures = json.loads((tmp_path / "metrics.json").read_text())
    test, losses = figures["test"], [step["loss"] for step in figures["training"]["steps"]]
    assert losses[-1] < losses[0]
    assert len(test["examples"]) == 3
    assert f"test BLEU {test['bleu']:.2f}, before the training {test['bleu_before']:.2f}" in shown
    assert figures["adapter"]["reloaded_max_difference"] == 0
    assert figures["settings"]["lora"]["task_type"] == "SEQ_2_SEQ_LM"
    assert "--source-column source" in (tmp_path / "reproduce.sh").read_text()


def test_report_measures_the_trainers_model(task, monkeypatch):
    """A model that returns the references has a BLEU of 100; the untrained one has less."""
    from lora_kernels.finetune.train.trainer import Trainer

    model = task.load_model()
    known = dict(zip(task.splits.test.sources, task.splits.test.targets, strict=True))
    ours = Translation.translate

    def translate(self, given, sources):
        return [known[source] for source in sources] if given is model else ours(self, given, sources)

    monkeypatch.setattr(Translation, "translate", translate)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), task.criterion, metrics=task.metrics)
    report = task.report(trainer, task.loader("test", 8), task.load_model())
    assert report["bleu"] == pytest.approx(100)
    assert report["bleu_before"] < 20
    assert report["examples"][0]["translation"] == report["examples"][0]["reference"]
    assert task.show(trainer, report)[0].startswith("test BLEU 100.00, before the training ")


def test_bleu():
    reference = ["der alte Hund sieht das Haus.", "die Katze braucht den Garten."]
    assert bleu(reference, reference) == pytest.approx(100)
    assert 0 < bleu(["der alte Hund sieht die Katze.", reference[1]], reference) < 90


def test_the_prefix_reaches_the_model(task):
    plain = task.encode(Pairs(["the dog."], ["der Hund."]))[0]
    prefixed = Translation(model=task.model, prefix="the old ").encode(Pairs(["the dog."], ["der Hund."]))[0]
    assert len(prefixed[0]) == len(plain[0]) + 2
    assert prefixed[1] == plain[1]


def test_a_model_is_needed_and_must_be_an_encoder_decoder(tiny_writer):
    with pytest.raises(ConfigError, match="give an encoder-decoder with --model"):
        Translation().load_model()
    with pytest.raises(ConfigError, match="cannot be loaded as AutoModelForSeq2SeqLM"):
        Translation(model=str(tiny_writer)).load_model()
    with pytest.raises(ConfigError, match="no decoder_start_token_id"):
        _ = Translation(model=str(tiny_writer))._start


@pytest.mark.parametrize("change", [{"limit": -1}, {"max_length": 1}])
def test_nonsense_is_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        Translation(**change)
