"""Tests siblings that run together: one dropout mask, and recomputation by checkpointing."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels.autograd.lora_linear import dropout_seed
from lora_kernels.integrations.peft import groups
from lora_kernels.integrations.peft.groups import groups_of
from lora_kernels.reference import generator_keep_mask
from lora_kernels.testing import assert_close
from tests.integrations.peft.siblings import K, Stack, adapted, adapter, attention, example, gradients, learned, same

pytestmark = pytest.mark.usefixtures("nothing_left_over")


def test_one_mask_for_all_siblings_and_the_gradients_of_that_mask():
    p, rows = 0.4, 512
    model = learned(adapted(Stack(1), p=p, r=8))
    block, x = attention(model), example(rows=rows)
    torch.manual_seed(3)
    outputs = [block.q(x), block.k(x), block.v(x)]
    torch.manual_seed(3)
    keep = generator_keep_mask(dropout_seed(None, x.device), p, rows, K)
    assert abs(keep.mean() - (1 - p)) < 4 * (p * (1 - p) / keep.numel()) ** 0.5
    upstream = [torch.randn(y.shape, generator=torch.Generator().manual_seed(5)) for y in outputs]

    def explicit(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *(w for n in "qkv" for w in adapter(block, n)))]
        made = []
        for i, name in enumerate("qkv"):
            base, (A, B) = getattr(block, name).base_layer, leaves[1 + 2 * i : 3 + 2 * i]
            XA = (leaves[0] * keep.to(dtype) / (1 - p)) @ A.t()
            made.append(
                nn.functional.linear(leaves[0], base.weight.to(dtype), base.bias.to(dtype)) + XA @ B.t() * (8 / 8)
            )
        grads = torch.autograd.grad(made, leaves, [u.to(dtype) for u in upstream])
        return [*(y.detach() for y in made), *grads]

    leaves = [x, *(w for name in "qkv" for w in adapter(block, name))]
    got = [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, upstream)]
    for i, (ours, plain, truth) in enumerate(zip(got, explicit(torch.float32), explicit(torch.float64), strict=True)):
        assert_close(ours, plain, truth, what=str(i))


def test_masks_of_many_calls_average_to_no_dropout():
    model = learned(adapted(Stack(1), p=0.3))
    block, x = attention(model), example(rows=1)
    with torch.no_grad():
        drawn = torch.stack([torch.cat([block.q(x), block.k(x), block.v(x)], 1)[0] for _ in range(2000)])
        expected = torch.cat([layer(x) for layer in (block.eval().q, block.k, block.v)], 1)[0]
    error = (drawn.mean(0) - expected) / (drawn.std(0) / 2000**0.5)
    assert error.abs().max() < 5
    assert drawn.std(0).min() > 1e-3


def test_only_siblings_of_one_dropout_share_a_mask(counted):
    model = learned(adapted(p=0.3))
    attention(model).k.eval()
    counted.clear()
    model(example())
    assert counted == [2, 1, 1, 3, 1]
    attention(model).k.train().lora_dropout["default"].p = 0.4
    counted.clear()
    model(example())
    assert counted == [2, 1, 1, 3, 1]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_checkpointing_repeats_what_ran(reentrant, p, counted):
    model, twin = adapted(p=p), adapted(p=p)
    model.base_model.model.reentrant = reentrant
    for step in range(4):
        counted.clear()
        x = example(step)
        if p and reentrant and step == 1:  # the last round runs with dropout, as the first one did
            assert groups_of(model)[0].sharing.partners is None
        same(gradients(model, x, step), gradients(twin, x, step))
    assert 3 in counted
    assert groups.unclaimed.made is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_forwards_before_the_first_backward_with_checkpointing(reentrant):
    """Partners must not change between a forward and its recomputation: the masks would differ."""
    model, twin = adapted(p=0.4), adapted(p=0.4, group=False)
    for m in (model, twin):
        m.base_model.model.reentrant = reentrant
    for round_ in range(3):
        results = []
        for m in (model, twin) if round_ == 0 else (model,):
            m.zero_grad()
            torch.manual_seed(round_)
            (m(example(1)).square().sum() + 2 * m(example(2)).square().sum()).backward()
            results.append({name: q.grad.clone() for name, q in m.named_parameters() if q.grad is not None})
        same(results[0], results[-1], 0)
    assert groups_of(model)[0].together()


def test_a_recomputation_that_stops_early_is_no_sign_of_other_readers(counted):
    model = learned(adapted())
    block = attention(model)

    def body(x):
        h = x.tanh()
        return block.q(h).sin().sum() + block.k(h).sum() + block.v(h).sum()

    for _ in range(3):
        counted.clear()
        (
            checkpoint(body, example(), use_reentrant=False) + checkpoint(body, example(1), use_reentrant=False)
        ).backward()
        assert counted == [3, 3, 3, 3]
