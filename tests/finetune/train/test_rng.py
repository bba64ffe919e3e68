import random

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from lora_kernels.finetune.train.rng import loader_state, rng_state, seed_all, set_loader_state, set_rng_state


def draw():
    old = (float(np.random.rand()), float(np.random.randn()))  # noqa: NPY002 (the global state is what is saved)
    return random.random(), random.gauss(0, 1), *old, torch.rand(2).tolist()


def test_state_is_put_back():
    seed_all(3)
    draw()  # leaves half a Gauss pair behind in each generator
    state = rng_state()
    expected = draw()
    random.seed(9)
    set_rng_state(state)
    assert draw() == expected


def test_seed_all_seeds_all():
    seed_all(4)
    first = draw()
    seed_all(4)
    assert draw() == first


def test_a_loaders_own_generators():
    data = list(range(10))
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(1))
    for loader in (
        DataLoader(data, 2, shuffle=True, generator=torch.Generator().manual_seed(2)),
        DataLoader(data, 2, sampler=sampler),
        DataLoader(data, batch_sampler=BatchSampler(sampler, 2, False)),
    ):
        state = loader_state(loader)
        assert len(state["loader"]) == 1
        first = torch.cat(list(loader)).tolist()
        assert torch.cat(list(loader)).tolist() != first
        set_loader_state(loader, state)
        assert torch.cat(list(loader)).tolist() == first
