"""Tests adapter_names on accelerated layers: PEFT's results, and cached ids that are never stale."""

import pytest
import torch
from peft import LoraConfig

from lora_kernels.check.compat.families import fill_adapters
from lora_kernels.integrations.peft import mixed
from lora_kernels.integrations.peft.accelerate import accelerate

NAMES = ["default", "other", "__base__", "default", "late"]


@pytest.fixture
def model(adapted):
    """Adapters of ranks 4, 3 and 6; "other" is not on the second layer, "late" on the second alone."""
    model = adapted()
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=5, target_modules=["first", "third"]))
    model.add_adapter("late", LoraConfig(r=6, lora_alpha=12, use_rslora=True, target_modules=["second"]))
    fill_adapters(model, seed=3)
    return model.eval()


def test_equals_peft_with_gradients(model, example, same, calls):
    same(model, example(5), adapter_names=NAMES)
    assert calls == {"mixed": 3}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_equals_peft(model, example, same, dtype):
    same(model, example(5), autocast=dtype, adapter_names=NAMES)


def test_a_sequence_has_one_adapter(model, run):
    x = torch.randn(5, 3, 12)
    ours = accelerate(model, verbose=False)
    whole = run(ours, x, adapter_names=NAMES)["y"]
    for row, name in enumerate(NAMES):
        alone = run(ours, x[row : row + 1], adapter_names=[name])["y"]
        torch.testing.assert_close(whole[row : row + 1], alone)


def test_a_weight_that_changes_in_any_way_counts_at_once(model, example):
    x, names = example(4).detach(), NAMES[:4]
    ours = accelerate(model, verbose=False)
    layer = ours.base_model.model.first
    changes = (
        lambda: layer.lora_A["other"].weight.data.mul_(3),
        lambda: layer.lora_B["default"].weight.detach().copy_(torch.randn(40, 4)),
        lambda: layer.set_scale("other", 4.0),
        lambda: setattr(layer.lora_A["default"], "weight", torch.nn.Parameter(torch.randn(4, 12))),
    )
    with torch.no_grad():
        before = ours(x, adapter_names=names)
        for change in changes:
            change()
            after = ours(x, adapter_names=names)
            assert not torch.equal(after, before)
            before = after


def test_gradients_after_inference_mode(model, example, run):
    ours, x = accelerate(model, verbose=False), example(5)
    with torch.inference_mode():
        before = ours(x, adapter_names=NAMES)
    torch.testing.assert_close(run(ours, x, adapter_names=NAMES)["y"], before)


def test_the_ids_of_another_thread_are_never_taken_for_ones_own(monkeypatch):
    """Another thread replaces the cached ids while they are read."""
    x = torch.zeros(2, 3)
    mine = mixed._ids_of(["a", "b"], ["a", "b"], x)

    class Key(tuple):
        def __eq__(self, other):
            mixed._ids = (), torch.full((2,), 7)
            return tuple.__eq__(self, other)

        def __ne__(self, other):
            return not self == other

        __hash__ = tuple.__hash__

    monkeypatch.setattr(mixed, "_ids", (Key(mixed._ids[0]), mine))
    assert mixed._ids_of(["a", "b"], ["a", "b"], x) is mine


def test_what_takes_pefts_own_forward(model, example, same, calls):
    model.add_adapter("odd", LoraConfig(r=2, target_modules=["third"], lora_bias=True))
    fill_adapters(model, seed=4)
    model.eval()
    same(model, example(3), adapter_names=["default", "odd", "__base__"])
    assert calls == {"mixed": 3, "lora_bias or dropout in a batch of several adapters": 1}
    calls.clear()
    same(model, example(2), adapter_names=["__base__", "__base__"])
    assert calls == {"mixed": 3, "no adapter of the batch is on it": 3}


def test_pefts_own_errors(model, example):
    ours = accelerate(model, verbose=False)
    with pytest.raises(ValueError, match="be the same as the number of inputs"):
        ours(example(5), adapter_names=NAMES[:2])
    with pytest.raises(ValueError, match="training mode"):
        ours.train()(example(5), adapter_names=NAMES)
    ours.add_adapter("dora", LoraConfig(r=2, target_modules=["third"], use_dora=True))
    with pytest.raises(ValueError, match="DoRA"):
        ours.eval()(example(1), adapter_names=["dora"])
