import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_kernels.errors import ConfigError
from lora_kernels.finetune.train.options import TrainOptions
from lora_kernels.finetune.train.trainer import Trainer, TrainingError


class Output:
    def __init__(self, logits):
        self.logits = logits


class DictModel(nn.Module):
    """Has the interface of a Hugging Face model: keyword inputs, an output object with logits."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask.unsqueeze(-1).float()
        return Output(self.head((self.embedding(input_ids) * mask).sum(1) / mask.sum(1)))


def separable(n=64):
    X = torch.randn(n, 5, generator=torch.Generator().manual_seed(0))
    return TensorDataset(X, (X[:, 0] + X[:, 1] > 0).long())


def network(dropout=0.0, dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 2)).to(dtype)


def accuracy(logits, targets):
    return (logits.argmax(-1) == targets).float().mean()


def quiet(**options):
    return TrainOptions(progress=False, **options)


def make(model, lr=0.1, criterion=None, metrics=None, optimizer=torch.optim.SGD, **options):
    optimizer = optimizer(model.parameters(), lr=lr)
    return Trainer(model, optimizer, criterion or nn.CrossEntropyLoss(), "cpu", quiet(**options), metrics=metrics)


def test_learns_a_separable_problem():
    data = separable(128)
    trainer = make(network(), lr=0.05, optimizer=torch.optim.AdamW, metrics={"accuracy": accuracy})
    before = trainer.evaluate(DataLoader(data, 32))
    history = trainer.train(DataLoader(data, 16, shuffle=True), DataLoader(data, 32), epochs=5)
    after = trainer.evaluate(DataLoader(data, 32))
    assert after["accuracy"] > 0.95 > before["accuracy"]
    assert history.epochs[-1]["val_loss"] == pytest.approx(after["loss"])
    assert [record["step"] for record in history.steps] == list(range(1, 41))
    assert history.tokens == 5 * 128


@pytest.mark.parametrize("size", [7, 8, 10])
def test_accumulated_batches_equal_one_big_batch(size):
    """Batches have unequal sizes; the last group and the last batch are partial."""
    data = separable(50)
    small, big = network(dtype=torch.float64), network(dtype=torch.float64)
    double = TensorDataset(data.tensors[0].double(), data.tensors[1])
    make(small, accumulate=3).train(DataLoader(double, size), epochs=2)
    make(big).train(DataLoader(double, 3 * size), epochs=2)
    for p, q in zip(small.parameters(), big.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_accumulation_counts_tokens_and_class_weights():
    """Ignored targets are unevenly distributed, and one batch has only such: they must have no weight."""
    torch.manual_seed(3)
    X = torch.randn(12, 5, dtype=torch.float64)
    y = torch.tensor([0, -100, -100, 1, 1, 0, -100, -100, -100, 1, -100, 0])
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0], dtype=torch.float64))
    small, big = network(dtype=torch.float64), network(dtype=torch.float64)
    make(small, criterion=criterion, accumulate=4).train(DataLoader(TensorDataset(X, y), 3))
    make(big, criterion=criterion).train(DataLoader(TensorDataset(X, y), 12))
    for p, q in zip(small.parameters(), big.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_a_summing_criterion_is_not_weighted():
    data = separable(12)
    small, big = network(), network()
    criterion = nn.CrossEntropyLoss(reduction="sum")
    make(small, lr=0.01, criterion=criterion, accumulate=2).train(DataLoader(data, 6))
    make(big, lr=0.01, criterion=criterion).train(DataLoader(data, 12))
    torch.testing.assert_close(small[0].weight, big[0].weight)


def test_dict_batches_with_output_objects():
    ids = torch.randint(1, 11, (40, 6), generator=torch.Generator().manual_seed(0))
    rows = [
        {"input_ids": i, "attention_mask": torch.ones(6, dtype=torch.long), "labels": (i.sum() > 33).long()}
        for i in ids
    ]
    torch.manual_seed(0)
    model = DictModel()
    trainer = make(model, lr=0.1, optimizer=torch.optim.Adam, metrics={"accuracy": accuracy})
    history = trainer.train(DataLoader(rows, 8, shuffle=True), epochs=10)
    assert history.tokens == 10 * 40 * 6
    assert trainer.evaluate(DataLoader(rows, 8))["accuracy"] > 0.8


def test_evaluation_leaves_no_trace():
    """Mode, weights and the random numbers of the training are unchanged."""
    model = network(dropout=0.5).train()
    trainer = make(model)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = trainer.evaluate(DataLoader(separable(), 16, shuffle=True))
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert first == pytest.approx(trainer.evaluate(DataLoader(separable(), 16)))


def test_seed_repeats_a_run():
    def run(seed):
        model = network(dropout=0.3)
        history = make(model, seed=seed).train(DataLoader(separable(), 16, shuffle=True), epochs=2)
        return [record["loss"] for record in history.steps]

    assert run(1) == run(1) != run(2)


def test_early_stopping_ends_with_the_best_weights():
    """Validation labels are the opposite of training labels, so the first epoch is the best."""
    data = separable()
    wrong = TensorDataset(data.tensors[0], 1 - data.tensors[1])
    model = network()
    trainer = make(model, lr=0.5, patience=2, metrics={"accuracy": accuracy})
    history = trainer.train(DataLoader(data, 16), DataLoader(wrong, 16), epochs=20)
    assert history.stopped_early
    assert len(history.epochs) == 3
    assert trainer.evaluate(DataLoader(wrong, 16))["loss"] == pytest.approx(history.epochs[0]["val_loss"])


def test_learning_rate_follows_warmup_and_decay():
    model = network()
    history = make(model, lr=1.0, schedule="linear", warmup=0.25).train(DataLoader(separable(64), 8))
    assert [round(record["lr"], 6) for record in history.steps] == [
        0.5,
        1.0,
        1.0,
        0.833333,
        0.666667,
        0.5,
        0.333333,
        0.166667,
    ]


def test_clipping_bounds_the_step():
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    make(model, lr=1.0, clip_norm=1e-3).train(DataLoader(separable(16), 16))
    moved = math.sqrt(
        sum(float(((p.detach() - q) ** 2).sum()) for p, q in zip(model.parameters(), before, strict=True))
    )
    assert moved == pytest.approx(1e-3, rel=1e-3)


def test_bf16_autocast_trains():
    model = network()
    trainer = make(model, lr=0.05, optimizer=torch.optim.AdamW, bf16=True, metrics={"accuracy": accuracy})
    trainer.train(DataLoader(separable(128), 16), epochs=5)
    assert model[0].weight.dtype == torch.float32
    logits, _ = next(trainer.predict(DataLoader(separable(), 16)))
    assert logits.dtype == torch.bfloat16
    assert trainer.evaluate(DataLoader(separable(128), 16))["accuracy"] > 0.9


def test_a_loss_that_is_not_finite_is_an_error():
    data = TensorDataset(torch.full((4, 5), float("inf")), torch.zeros(4, dtype=torch.long))
    with pytest.raises(TrainingError, match="step 1; lower the learning rate"):
        make(network()).train(DataLoader(data, 2))


def test_what_cannot_work_is_refused():
    with pytest.raises(ConfigError, match="monitor"):
        make(network(), monitor="f1")
    with pytest.raises(ConfigError, match="validation data"):
        make(network(), patience=1).train(DataLoader(separable(), 8))
    with pytest.raises(ConfigError, match="nothing to train on"):
        make(network()).train(DataLoader(separable(), 8), epochs=0)
    with pytest.raises(ConfigError, match="nothing to train on"):
        make(network()).train([])


def test_a_scheduler_of_ones_own_is_stepped():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    own = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    history = Trainer(model, optimizer, nn.CrossEntropyLoss(), options=quiet(), scheduler=own).train(
        DataLoader(separable(32), 8)
    )
    assert [record["lr"] for record in history.steps] == [1.0, 1.0, 0.5, 0.5]
