"""From a task to files, with a task that is not classification: any Task can be trained."""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_kernels import LoRAConfig
from lora_kernels.errors import BackendUnavailableError, ConfigError
from lora_kernels.finetune.advise.recipe import Recipe, run
from lora_kernels.finetune.tasks import Task
from lora_kernels.finetune.train.options import TrainOptions


@dataclass(frozen=True)
class NextLetter(Task):
    """Predicts the next of eight letters in cyclic order. The first target is ignored."""

    name: ClassVar[str] = "next-letter"
    task_type: ClassVar[str] = "CAUSAL_LM"

    rows: int = 64

    @classmethod
    def add_arguments(cls, parser):
        parser.add_argument("--rows", type=int, default=cls.rows)

    def load_model(self):
        generator = torch.Generator().manual_seed(0)
        model = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
        return model

    @cached_property
    def data(self):
        start = torch.randint(0, 8, (self.rows, 1), generator=torch.Generator().manual_seed(1))
        letters = (start + torch.arange(6)) % 8
        targets = (letters + 1) % 8
        targets[:, 0] = -100
        return TensorDataset(letters, targets)

    def loader(self, part, batch_size):
        return DataLoader(self.data, batch_size, shuffle=part == "train")

    def describe_data(self):
        return f"{self.rows} rows"

    @property
    def criterion(self):
        cross_entropy = nn.CrossEntropyLoss()

        def criterion(logits, targets):
            return cross_entropy(logits.flatten(0, 1), targets.flatten())

        criterion.ignore_index = -100
        return criterion

    @property
    def metrics(self):
        return {"accuracy": lambda logits, targets: (logits.argmax(-1) == targets)[targets >= 0].float().mean()}

    def report(self, trainer, loader, untrained):
        return trainer.evaluate(loader)

    def show(self, trainer, report):
        return [f"accuracy {report['accuracy']:.2f}"]


def recipe(**changes):
    lora = LoRAConfig(r=4, lora_alpha=8, target_modules=["1", "3"])
    return Recipe(lora=lora, options=TrainOptions(progress=False), **{"batch_size": 8, "lr": 0.02, **changes})


def test_another_kind_of_task_goes_the_whole_way(tmp_path):
    said = []
    figures = run(NextLetter(), recipe(epochs=20, beside_peft=True), tmp_path, said.append)
    assert figures == json.loads((tmp_path / "metrics.json").read_text())
    assert figures["test"]["accuracy"] > 0.9
    assert figures["adapter"]["reloaded_max_difference"] == 0
    assert figures["adapter"]["merged_agreement"] == 1
    assert figures["memory"]["state_bytes"] < figures["memory"]["full_state_bytes"]
    assert figures["parameters"]["trainable"] == 4 * (16 + 16) + 4 * (16 + 8)
    assert figures["settings"]["task"] == "next-letter"
    assert figures["training"]["steps"][0]["weight"] == 8 * 5
    assert said[0] == "64 rows"
    assert (tmp_path / "training.png").exists()


def test_the_model_is_read_twice_and_checked_as_it_was_read(tmp_path, monkeypatch):
    """The model is loaded once for training and once for comparisons; the report gets the second one untrained."""
    read, load, report = [], NextLetter.load_model, NextLetter.report

    def loaded(self):
        read.append(load(self))
        return read[-1]

    def reported(self, trainer, loader, untrained):
        assert untrained is read[1]
        expected = load(self).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in untrained.state_dict().items())
        return report(self, trainer, loader, untrained)

    monkeypatch.setattr(NextLetter, "load_model", loaded)
    monkeypatch.setattr(NextLetter, "report", reported)
    figures = run(NextLetter(), recipe(), tmp_path, lambda line: None)
    assert len(read) == 2
    assert figures["adapter"]["reloaded_max_difference"] == 0
    assert figures["memory"]["full_state_bytes"] == 3 * 4 * (8 * 16 + 16 * 17 + 8 * 17)


def test_a_seed_is_a_result(tmp_path):
    def losses(seed):
        figures = run(NextLetter(), recipe(seed=seed), tmp_path, lambda line: None)
        return [step["loss"] for step in figures["training"]["steps"]]

    assert losses(1) == losses(1) != losses(2)


def test_a_backend_that_cannot_run_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_kernels.planning.choose.triton_missing", lambda device: "no reason")
    with pytest.raises(BackendUnavailableError):
        run(NextLetter(), recipe(backend="triton"), tmp_path, lambda line: None)


@pytest.mark.parametrize("change", [{"batch_size": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"weight_decay": -1.0}])
def test_nonsense_is_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        recipe(**change)
