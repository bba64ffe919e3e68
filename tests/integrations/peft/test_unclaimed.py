"""Tests the cache of outputs computed for siblings that have not been called yet."""

import threading

import pytest
import torch

from lora_kernels.integrations.peft.groups import Group
from lora_kernels.integrations.peft.unclaimed import GroupOutputs, discard_unclaimed, unclaimed

pytestmark = pytest.mark.usefixtures("nothing_left_over")
MODE = (True, False, None)
PAIR = ((0, 1), (0, 1))


def made(x):
    group = Group("block", ("q", "k"), PAIR)
    return GroupOutputs(group, PAIR, x, MODE, {1: (torch.ones(2), [])})


def test_it_holds_for_one_tensor_in_one_state_and_mode():
    x = torch.ones(2)
    cached = made(x)
    assert cached.holds_for(x, MODE)
    assert not cached.holds_for(x.clone(), MODE)
    assert not cached.holds_for(x, (False, False, None))
    x.add_(1)
    assert not cached.holds_for(x, MODE)


def test_what_is_dropped_holds_for_nothing():
    x = torch.ones(2)
    cached = made(x)
    cached.drop()
    assert not cached.holds_for(x, MODE)
    assert cached.outputs == {}


def test_discarding_counts_a_miss_and_releases_all():
    unclaimed.made = cached = made(torch.ones(2))
    discard_unclaimed()
    discard_unclaimed()
    assert unclaimed.made is cached.x is None
    assert cached.group.sharing.misses == 1


def test_each_thread_has_its_own():
    unclaimed.made, seen = made(torch.ones(2)), []
    thread = threading.Thread(target=lambda: seen.append(unclaimed.made))
    thread.start()
    thread.join()
    assert seen == [None]


def test_a_recomputation_is_dropped_when_its_backward_ends():
    """This happens in the engine's own thread and is not counted as a miss."""
    cached = []

    class Recompute(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, dy):
            cached.append(made(torch.ones(2)))
            assert cached[0].recomputed
            assert cached[0].outputs
            return dy

    Recompute.apply(torch.ones(2, requires_grad=True)).sum().backward()
    assert cached[0].x is None
    assert cached[0].outputs == {}
    assert cached[0].group.sharing.misses == 0
