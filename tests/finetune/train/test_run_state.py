"""A run that is interrupted anywhere and resumed has exactly the result of an uninterrupted one."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lora_kernels.finetune.train.checkpoint import CheckpointError, checkpoints
from lora_kernels.finetune.train.options import TrainOptions
from lora_kernels.finetune.train.run_state import changing_weights, load_weights
from lora_kernels.finetune.train.trainer import Trainer

SCRIPT = """
import sys, time
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lora_kernels.finetune.train.options import TrainOptions
from lora_kernels.finetune.train.trainer import Trainer

folder = Path(sys.argv[1])
torch.set_num_threads(1)
torch.manual_seed(0)
X = torch.randn(64, 5)
model = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.2), nn.BatchNorm1d(16), nn.Linear(16, 2))
model.register_forward_hook(lambda *_: time.sleep(0.012))
options = TrainOptions(
    accumulate=2, clip_norm=1.0, schedule="cosine", warmup=3, seed=7, progress=False,
    checkpoint_dir=folder / "checkpoints", checkpoint_every=1,
)
trainer = Trainer(model, torch.optim.AdamW(model.parameters(), lr=0.01), nn.CrossEntropyLoss(), options=options)
print("ready", flush=True)
history = trainer.train(DataLoader(TensorDataset(X, (X[:, 0] > 0).long()), 4, shuffle=True), epochs=4, resume=True)
torch.save((model.state_dict(), history.steps), folder / "part")
(folder / "part").rename(folder / "result")
"""


class Interrupt(Exception):
    pass


def build(folder, *, interrupt_at=None, generator=False, **changes):
    """Make a trainer whose result depends on everything in a checkpoint, and its data."""
    torch.manual_seed(0)
    X = torch.randn(42, 5)
    model = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 2))
    model[0].bias.requires_grad_(False)
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1
        random.random()
        if calls == interrupt_at:
            raise Interrupt

    model.register_forward_pre_hook(count)
    dataset = TensorDataset(X, (X[:, 0] > 0).long())
    if generator:
        sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(11))
        loader = DataLoader(dataset, 4, sampler=sampler)
    else:
        loader = DataLoader(dataset, 4, shuffle=True)
    options = {"accumulate": 2, "clip_norm": 1.0, "schedule": "cosine", "warmup": 3, "seed": 7, "patience": 3} | changes
    settings = TrainOptions(checkpoint_dir=folder, progress=False, **options)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    return Trainer(model, optimizer, nn.CrossEntropyLoss(), options=settings), loader, DataLoader(dataset, 8)


def outcome(trainer, history):
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    return weights, history.steps, history.epochs, history.best, random.random(), torch.rand(2).tolist()


def same(one, two):
    assert one[0].keys() == two[0].keys()
    for name in one[0]:
        assert torch.equal(one[0][name], two[0][name]), name
    assert one[1:] == two[1:]


@pytest.mark.parametrize("generator", [False, True])
@pytest.mark.parametrize("interrupt_at", [1, 4, 12, 19, 30, 50])
def test_interrupted_and_resumed_is_the_same_run(tmp_path, interrupt_at, generator):
    trainer, loader, validation = build(tmp_path / "whole", checkpoint_every=2, generator=generator)
    expected = outcome(trainer, trainer.train(loader, validation, epochs=3))

    parts = tmp_path / "parts"
    trainer, loader, validation = build(parts, interrupt_at=interrupt_at, checkpoint_every=2, generator=generator)
    with pytest.raises(Interrupt):
        trainer.train(loader, validation, epochs=3)
    random.seed(123)
    trainer, loader, validation = build(parts, checkpoint_every=2, generator=generator)
    same(outcome(trainer, trainer.train(loader, validation, epochs=3, resume=True)), expected)


def test_checkpoints_do_not_disturb_the_run(tmp_path):
    results = []
    for folder, every in ((None, 0), (tmp_path / "a", 1), (tmp_path / "b", 3)):
        trainer, loader, validation = build(folder, checkpoint_every=every)
        results.append(outcome(trainer, trainer.train(loader, validation, epochs=2)))
    same(results[0], results[1])
    same(results[0], results[2])
    assert len(checkpoints(tmp_path / "a")) == 2


def test_a_finished_run_resumes_to_its_end(tmp_path):
    trainer, loader, validation = build(tmp_path)
    first = trainer.train(loader, validation, epochs=2)
    again, loader, validation = build(tmp_path, interrupt_at=1)
    second = again.train(loader, validation, epochs=2, resume=True)
    assert second.steps == first.steps
    assert torch.equal(again.model[3].weight, trainer.model[3].weight)


def test_a_constant_schedule_may_be_trained_on(tmp_path):
    whole, loader, validation = build(tmp_path / "a", schedule="constant")
    expected = whole.train(loader, validation, epochs=3)
    for epochs in (1, 3):
        trainer, loader, validation = build(tmp_path / "b", schedule="constant")
        history = trainer.train(loader, validation, epochs=epochs, resume=True)
    assert history.steps == expected.steps


def test_other_settings_are_refused(tmp_path):
    trainer, loader, validation = build(tmp_path)
    trainer.train(loader, validation, epochs=1)
    trainer, loader, validation = build(tmp_path, accumulate=3, settings={"lr": 0.1})
    with pytest.raises(CheckpointError, match=r"accumulate \(then 2, now 3\), lr \(then None, now 0.1\)"):
        trainer.train(loader, validation, epochs=1, resume=True)


def _changed_rows(trainer, loader, validation):
    loader.dataset.tensors[0][5, 0] += 1


def _swapped_rows(trainer, loader, validation):
    for tensor in loader.dataset.tensors:
        tensor[[0, 1]] = tensor[[1, 0]]


def _changed_frozen(trainer, loader, validation):
    trainer.model[0].bias[3] += 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_changed_rows, "other training data and other validation data"),
        (_swapped_rows, "other training data and other validation data"),
        (_changed_frozen, "other frozen weights"),
    ],
)
def test_other_content_under_the_same_names_is_refused(tmp_path, change, message):
    trainer, loader, validation = build(tmp_path)
    trainer.train(loader, validation, epochs=1)
    trainer, loader, validation = build(tmp_path)
    change(trainer, loader, validation)
    with pytest.raises(CheckpointError, match=message):
        trainer.train(loader, validation, epochs=1, resume=True)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(tmp_path):
    trainer, loader, validation = build(tmp_path / "whole", checkpoint_every=2)
    expected = outcome(trainer, trainer.train(loader, validation, epochs=3))
    folder = tmp_path / "parts"
    trainer, loader, validation = build(folder, interrupt_at=30, checkpoint_every=2)
    with pytest.raises(Interrupt):
        trainer.train(loader, validation, epochs=3)
    newest = checkpoints(folder)[0]
    content = bytearray(newest.read_bytes())
    content[-9] ^= 4  # one bit of one number: safetensors reads it without an error
    newest.write_bytes(content)
    trainer, loader, validation = build(folder, checkpoint_every=2)
    with pytest.warns(UserWarning, match="resuming from step-"):
        history = trainer.train(loader, validation, epochs=3, resume=True)
    same(outcome(trainer, history), expected)


def test_an_earlier_run_is_not_overwritten(tmp_path):
    trainer, loader, validation = build(tmp_path)
    trainer.train(loader, validation, epochs=1)
    with pytest.raises(CheckpointError, match="earlier run"):
        trainer.train(loader, validation, epochs=1)


def test_resume_needs_a_folder():
    trainer, loader, _ = build(None, patience=None)
    with pytest.raises(CheckpointError, match="checkpoint_dir"):
        trainer.train(loader, resume=True)


def test_weights_of_another_model_change_nothing():
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    good = {name: torch.zeros_like(tensor) for name, tensor in changing_weights(model).items()}
    with pytest.raises(CheckpointError, match="another model"):
        load_weights(model, {**good, "bias": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="another model"):
        load_weights(model, {"weight": good["weight"]})
    assert torch.equal(model.weight, before)


def test_frozen_parameters_are_not_kept():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model[0].weight.requires_grad_(False)
    assert set(changing_weights(model)) == {
        "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked",
    }  # fmt: skip


def start(folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)], stdout=subprocess.PIPE, env=environment)


def kill_and_resume(folder: Path, kills: int) -> None:
    (folder / "whole").mkdir()
    assert start(folder / "whole").wait(120) == 0
    expected, expected_steps = torch.load(folder / "whole" / "result", weights_only=False)

    draw = random.Random(0)
    parts = folder / "parts"
    parts.mkdir()
    killed = 0
    while not (parts / "result").exists():
        process = start(parts)
        assert process.stdout is not None
        process.stdout.readline()
        if killed < kills:
            time.sleep(
                draw.uniform(0.01, 0.7 / kills)
            )  # a run takes more than 0.7 s, so every kill hits a running process
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
        else:
            assert process.wait(900) == 0
        process.stdout.close()
    assert killed == kills
    weights, steps = torch.load(parts / "result", weights_only=False)
    assert steps == expected_steps
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_kill_9_and_resume_ends_with_the_same_result(tmp_path):
    kill_and_resume(tmp_path, kills=2)


@pytest.mark.slow
def test_ten_times_kill_9_and_resume_ends_with_the_same_result(tmp_path):
    kill_and_resume(tmp_path, kills=10)
