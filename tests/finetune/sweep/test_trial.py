import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_kernels import LoRAConfig
from lora_kernels.errors import ConfigError
from lora_kernels.finetune.advise.recipe import Recipe, run
from lora_kernels.finetune.sweep.trial import FULL, HEAD_ONLY, LORA, RUNGS, run_trial
from lora_kernels.finetune.tasks import Task
from lora_kernels.finetune.train.lora import LoRA
from lora_kernels.finetune.train.options import TrainOptions


@dataclasses.dataclass(frozen=True)
class Signs(Task):
    """Predicts the sign of a sum; ``classifier`` is the new head."""

    name = "signs"
    task_type = "SEQ_CLS"
    monitor = "accuracy"

    @classmethod
    def add_arguments(cls, parser):
        pass

    def load_model(self):
        model = nn.Sequential()
        for name, layer in (("body", nn.Linear(6, 8)), ("act", nn.Tanh()), ("classifier", nn.Linear(8, 2))):
            model.add_module(name, layer)
        return model

    def loader(self, part, batch_size):
        X = torch.randn(64, 6, generator=torch.Generator().manual_seed(len(part)))
        return DataLoader(TensorDataset(X, (X.sum(1) > 0).long()), batch_size, shuffle=part == "train")

    def describe_data(self):
        return "64 rows"

    criterion = nn.CrossEntropyLoss()
    metrics = {"accuracy": lambda logits, targets: (logits.argmax(-1) == targets).float().mean()}  # noqa: RUF012

    def report(self, trainer, loader, untrained):
        return trainer.evaluate(loader)

    def show(self, trainer, report):
        return []


def recipe(**changes):
    lora = LoRAConfig(r=2, lora_alpha=4, target_modules=["body"], lora_dropout=0.1, task_type="SEQ_CLS")
    options = TrainOptions(progress=False, monitor="accuracy", schedule="cosine")
    return Recipe(lora, options, **{"batch_size": 8, "lr": 0.02, "epochs": 2, **changes})


@pytest.mark.parametrize("change", [{}, {"seed": 3}, {"loraplus": 8.0}])
def test_a_trial_ends_with_what_train_gives_watched_or_not(tmp_path, change):
    glances, given = [], recipe(**change)
    given = dataclasses.replace(given, options=dataclasses.replace(given.options, monitor="loss"))
    alone = run_trial(Signs(), given)
    watched = run_trial(Signs(), given, LORA, lambda rung, value: bool(glances.append((rung, value))))
    trained = run(Signs(), given, tmp_path, lambda line: None)
    expected = trained["training"]["epochs"][-1]["val_loss"]
    assert alone.value == watched.value == expected
    assert [rung for rung, _ in glances] == [1, 2, 3]
    assert (alone.state, alone.rows) == ("complete", 64)
    assert alone.trainable == trained["parameters"]["trainable"] == 2 * (6 + 8) + 8 * 2 + 2
    assert 0 < alone.seconds <= alone.wall


def test_settings_make_a_difference():
    losses = dataclasses.replace(recipe().options, monitor="loss")
    changes = ({}, {"seed": 3}, {"loraplus": 8.0}, {"lr": 0.1})
    values = [run_trial(Signs(), dataclasses.replace(recipe(**change), options=losses)).value for change in changes]
    assert len(set(values)) == len(values)


def test_b_learns_at_its_own_rate():
    model = LoRA(Signs().load_model(), recipe().lora)
    rates = [group["lr"] for group in recipe(loraplus=8.0).optimizer(model).param_groups]
    assert rates == pytest.approx([0.02, 1e-6, 0.16, 0.16])
    assert [group["lr"] for group in recipe().optimizer(model).param_groups] == [0.02]


def test_a_trial_is_given_up_when_the_watcher_says_so():
    seen = []
    outcome = run_trial(Signs(), recipe(), LORA, lambda rung, value: bool(seen.append(value)) or rung == 2)
    assert outcome.state == "pruned"
    assert outcome.value == seen[-1]
    assert len(seen) == 2 < RUNGS


def test_the_best_epoch_counts_where_training_stops_early(tmp_path):
    options = dataclasses.replace(recipe().options, patience=1)
    early = dataclasses.replace(recipe(epochs=12, lr=0.3), options=options)
    history = run(Signs(), early, tmp_path, lambda line: None)["training"]
    values = [epoch["val_accuracy"] for epoch in history["epochs"]]
    assert run_trial(Signs(), early).value == max(values) > values[-1]


def test_a_loss_that_is_not_finite_is_no_crash():
    outcome = run_trial(Signs(), recipe(lr=1e30, epochs=3))
    assert outcome.state == "diverged"
    assert math.isnan(outcome.value)


def test_baselines_train_all_or_the_head():
    full, head = (run_trial(Signs(), recipe(loraplus=4.0), kind) for kind in (FULL, HEAD_ONLY))
    assert full.trainable == 6 * 8 + 8 + 8 * 2 + 2
    assert head.trainable == 8 * 2 + 2
    assert full.state == head.state == "complete"
    by_loss = dataclasses.replace(recipe().options, monitor="loss")
    plain, plus = (dataclasses.replace(recipe(loraplus=ratio), options=by_loss) for ratio in (None, 4.0))
    assert run_trial(Signs(), plain, FULL).value == run_trial(Signs(), plus, FULL).value  # there is no B


def test_a_mistake_is_not_a_bad_trial():
    with pytest.raises(ConfigError, match="monitor"):
        run_trial(Signs(), dataclasses.replace(recipe(), options=TrainOptions(monitor="f1")))
