import pytest
import torch
from torch import nn

from lora_kernels.errors import ConfigError
from lora_kernels.finetune.tasks import Classification
from lora_kernels.finetune.train.trainer import Trainer


@pytest.fixture
def task(tmp_path):
    rows = [f"{'a fine film ' * (i % 4 + 1)}number {i},{['down', 'flat', 'up'][i % 3]}\n" for i in range(90)]
    path = tmp_path / "data.csv"
    path.write_text("text,label\n" + "".join(rows))
    return Classification(data=str(path), limit=40, max_length=10)


def test_data(task):
    assert task.describe_data().endswith("40 train, 9 validation, 9 test sentences; classes: down, flat, up")
    assert task.loader("train", 8).batch_sampler.shuffle
    assert not task.loader("test", 8).batch_sampler.shuffle


def test_batches_are_padded_and_cut(task):
    batches = list(task.loader("train", 8))
    assert sum(len(batch["labels"]) for batch in batches) == 40
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.shape == mask.shape
        assert ids.shape[1] == int(mask.sum(1).max()) <= 10
        assert bool((ids[mask == 0] == 0).all())
        assert bool((ids[:, 0] == 101).all())  # [CLS]


def test_padding_changes_no_logits(task):
    torch.manual_seed(0)
    model = task.load_model().eval()
    rows = [(ids, 0) for ids in task.encode(["fine", "a fine film number one"])]
    both = {name: tensor for name, tensor in task.collate(rows).items() if name != "labels"}
    alone = {name: tensor for name, tensor in task.collate(rows[:1]).items() if name != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(model(**both).logits[:1], model(**alone).logits, rtol=1e-4, atol=1e-5)


def test_the_model_has_the_datas_classes(task):
    assert task.load_model().config.id2label == {0: "down", 1: "flat", 2: "up"}


def test_report_and_what_is_shown(task):
    class Longest(nn.Module):
        """Predicts "up" for every sentence."""

        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([0.0, 1.0, 5.0]))

        def forward(self, input_ids, attention_mask):
            return self.logits.expand(len(input_ids), 3)

    model = Longest()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, task.criterion, metrics=task.metrics)
    report = task.report(trainer, task.loader("test", 4), task.load_model())
    assert report["accuracy"] == pytest.approx(1 / 3)
    assert report["confusion_matrix"] == [[0, 0, 3], [0, 0, 3], [0, 0, 3]]
    assert trainer.evaluate(task.loader("test", 4))["accuracy"] == pytest.approx(1 / 3)
    lines = task.show(trainer, report)
    assert lines[0] == "test accuracy 0.3333"
    assert lines[1].split() == ["true", "|", "predicted", "down", "flat", "up"]
    assert lines[2].split() == ["down", "0", "0", "3"]
    assert lines[-2] == '"I love programming" -> up (0.976)'
    assert lines[-1].startswith('"I hate programming" -> up')


def test_the_same_task_has_the_same_settings(task):
    assert task.settings()["data"] == task.data
    assert "tokenizer" not in task.settings()


@pytest.mark.parametrize("change", [{"limit": -1}, {"max_length": 1}])
def test_nonsense_is_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        Classification(**change)
