"""What a pool attaches to its model: hooks and generate(), as long as a batch is open."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_kernels.pool.active import ActiveBatch
from lora_kernels.pool.batch import OpenBatch
from lora_kernels.pool.call import Call
from lora_kernels.pool.ids import BatchIds
from lora_kernels.pool.root import Root


class Model(nn.Module):
    def forward(self, x: Tensor) -> int:
        self.seen = active.get() and active.get().call
        return 0

    def generate(self, expand: int) -> list[int]:
        batch: Any = active.get()
        seen = [batch.expand]
        self._expand_inputs_for_generation(expand_size=expand)
        self(torch.zeros(2 * expand, 1))
        return [*seen, batch.expand]

    @staticmethod
    def _expand_inputs_for_generation(expand_size: int = 1) -> None:
        if expand_size == 13:
            raise ValueError("mine")


active = ActiveBatch()


@pytest.fixture
def root() -> Root:
    active.var.set(None)
    active.make_call = lambda args, kwargs: Call(args, kwargs, ["x"], False)
    return Root(Model(), active)


def opened() -> OpenBatch:
    batch = OpenBatch(active, BatchIds(torch.tensor([0, 1], dtype=torch.int32), 2, named=True, values=[0, 1]))
    active.var.set(batch)
    return batch


def test_attached_while_batches_are_open(root: Root) -> None:
    model: Any = root.model
    before = dict(vars(model))
    root.attach()
    root.attach()
    root.detach()
    assert set(vars(model)) - set(before) == {"generate", "_expand_inputs_for_generation"}
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    root.detach()
    assert vars(model).keys() == before.keys()
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_what_was_on_the_model_comes_back(root: Root) -> None:
    model: Any = root.model
    model.generate = own = lambda expand: "mine"
    root.attach()
    assert model.generate(1) == "mine"
    root.detach()
    assert model.generate is own


def test_the_batch_sees_the_call_while_it_runs(root: Root) -> None:
    model: Any = root.model
    root.attach()
    model(torch.zeros(2, 1))  # no batch here
    assert model.seen is None
    batch, x = opened(), torch.zeros(2, 1)
    model(x)
    assert model.seen.main == {"x": x}
    assert batch.call is None
    root.detach()


def test_the_batch_sees_the_arguments_as_given_before_hooks_change_them(root: Root) -> None:
    model: Any = root.model
    mine = model.register_forward_pre_hook(lambda module, args: (torch.cat([args[0], args[0]]),))
    root.attach()
    opened()
    x = torch.zeros(2, 1)
    model(x)
    assert model.seen.main["x"] is x
    root.detach()
    mine.remove()


def test_generate_repeats_requests_until_it_ends(root: Root) -> None:
    model: Any = root.model
    root.attach()
    batch = opened()
    assert model.generate(3) == [1, 3]
    assert batch.expand == 1
    with pytest.raises(ValueError, match="mine"):
        model.generate(13)
    assert batch.expand == 1
    root.detach()


def test_copies_made_meanwhile(root: Root) -> None:
    root.attach()
    batch = opened()
    for other in (copy.deepcopy(root.model), pickle.loads(pickle.dumps(root.model))):
        assert other.generate.method.__self__ is other
        other(torch.zeros(2, 1))
        assert other.seen is None
    assert batch.expand == 1
    root.detach()
