import pytest
import torch
from torch import nn

from lora_kernels.errors import ConfigError
from lora_kernels.finetune.train.schedule import SCHEDULES, learning_rate_factor, make_schedule, warmup_steps


def factors(kind, warmup, steps):
    return [learning_rate_factor(step, kind=kind, warmup=warmup, steps=steps) for step in range(steps + 2)]


def test_shapes():
    assert factors("constant", 2, 4) == [0.5, 1, 1, 1, 1, 1]
    assert factors("linear", 0, 4) == [1, 0.75, 0.5, 0.25, 0, 0]
    assert factors("cosine", 0, 2) == pytest.approx([1, 0.5, 0, 0])
    assert factors("cosine", 4, 4)[:4] == [0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_step_moves(kind):
    assert all(factor > 0 for factor in factors(kind, 3, 10)[:10])


def test_warmup_is_a_share_or_a_number():
    assert warmup_steps(0.1, 25) == 3
    assert warmup_steps(0.0, 25) == 0
    assert warmup_steps(7, 25) == 7
    assert warmup_steps(100, 25) == 25


def test_nonsense_is_refused():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="one of constant, linear, cosine"):
        make_schedule(optimizer, "square", 0, 10)
    with pytest.raises(ConfigError, match="warmup"):
        make_schedule(optimizer, "linear", -1, 10)
