"""The compositions give what the explicit forwards and backwards give, by the rule, with the same masks."""

import copy

import pytest
import torch

import lora_kernels as lk
from lora_kernels.autograd.lora_conv import lora_conv
from lora_kernels.reference import composition, generator_keep_mask, philox_keep_mask
from lora_kernels.testing import assert_close, make_problem, plain, truth
from lora_kernels.testing.multi import make_multi_problem, mix_ids, multi_plain, multi_truth
from tests.autograd.cases import DROPS, NAMES, case

SEED = torch.tensor([5, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
def test_values_and_gradients_with_create_graph_by_the_rule(dtype, p, adapter_dtype):
    q = make_problem(96, 48, 64, 8, dtype, dropout_p=p, adapter_dtype=adapter_dtype)
    philox = philox_keep_mask(q.seed, p, 96, 64) if p else None
    own = [T.clone().requires_grad_() for T in (q.X, q.A, q.B, q.bias)]
    with torch.autograd.forward_ad.dual_level():
        keep = None if philox is None else philox.to(dtype)
        Y = composition.lora_linear(own[0], q.W, own[1], own[2], own[3], q.scaling, keep, p)
    grads = torch.autograd.grad(Y, own, q.dY, create_graph=True)
    names = "Y", "dX", "dA", "dB", "dbias"
    for name, got, other, true in zip(
        names, (Y, *grads), _five(plain(q, philox)), _five(truth(q, philox)), strict=True
    ):
        assert_close(got, other, true, what=name)


def _five(results):
    return results.Y, results.dX, results.dA, results.dB, results.dbias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixed_batches_with_create_graph_by_the_rule(dtype):
    q = make_multi_problem(mix_ids("uniform", 200, 4, seed=2), 20, 28, (8, 0, 3, 16), dtype)
    own = [T.clone().requires_grad_() for T in (q.X, q.slots.A, q.slots.B, q.bias)]
    Y = lk.multi_lora_linear(own[0], q.W, q.slots._replace(A=own[1], B=own[2]), q.ids, own[3])
    grads = torch.autograd.grad(Y, own, q.dY, create_graph=True)
    for name, got, other, true in zip(
        ("Y", "dX", "dA", "dB", "dbias"), (Y, *grads), multi_plain(q), multi_truth(q), strict=True
    ):
        assert_close(got, other, true, what=name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_first_derivatives_are_the_fused_ones(name, p):
    function, leaves = case(name, p if name in DROPS else 0.0)
    Y = function(*leaves)
    dY = torch.randn(Y.shape, dtype=Y.dtype, generator=torch.Generator().manual_seed(0))
    want = torch.autograd.grad(Y, leaves, dY, retain_graph=True)
    got = torch.autograd.grad(Y, leaves, dY, create_graph=True)
    torch.testing.assert_close(got, want)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        torch.testing.assert_close(function(*leaves), Y)


@pytest.mark.parametrize("name", ["linear", "dora", "stacked", "mlp"])
def test_the_masks_of_kernels_are_drawn_as_they_draw_them(name):
    function, leaves = case(name, 0.4, dtype=torch.float32, backend="triton")
    Y = function(*leaves)
    dY = torch.randn(Y.shape, generator=torch.Generator().manual_seed(0))
    want = torch.autograd.grad(Y, leaves, dY, retain_graph=True)
    got = torch.autograd.grad(Y, leaves, dY, create_graph=True)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_row_sees_no_other_adapter():
    A, B = torch.randn(3, 6), torch.randn(5, 3)
    A[2], B[:, 2] = float("inf"), float("nan")
    slots = lk.Slots.of(A, B, [2, 1], 1.5)
    ids, X, W = torch.tensor([0, 1, -1]), torch.randn(3, 6), torch.randn(5, 6)
    Y, tangent = torch.func.jvp(lambda X: lk.multi_lora_linear(X, W, slots, ids), (X,), (X,))
    assert Y[[0, 2]].isfinite().all()
    assert tangent[[0, 2]].isfinite().all()
    assert not Y[1].isfinite().any()


def test_no_row_with_an_adapter_has_zero_gradients():
    A, B = torch.randn(2, 6).requires_grad_(), torch.randn(5, 2).requires_grad_()
    X = torch.randn(3, 6, requires_grad=True)
    Y = lk.multi_lora_linear(X, torch.randn(5, 6), (A, B, [2], 1.0), torch.tensor([-1, -1, -1]))
    dX, dA, dB = torch.autograd.grad(Y.square().sum(), (X, A, B), create_graph=True)
    assert dX.requires_grad
    assert not dA.any()
    assert not dB.any()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolutions_mask_is_the_one_of_its_layout(memory_format):
    X = torch.randn(2, 3, 5, 5).to(memory_format=memory_format).requires_grad_()
    W, A, B = torch.randn(4, 3, 3, 3), torch.randn(2, 3, 3, 3), torch.randn(4, 2, 1, 1)

    def run(X):
        return lora_conv(X, W, A, B, padding=1, dropout_p=0.5, seed=3)

    Y = run(X)
    (want,) = torch.autograd.grad(Y.sum(), X, retain_graph=True)
    (got,) = torch.autograd.grad(Y.sum(), X, create_graph=True)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.func.jvp(run, (X.detach(),), (X.detach(),))[0], Y)


def test_a_seed_fixes_the_mask_and_a_mapped_seed_one_for_each():
    X = torch.ones(6, 5)
    keep = composition.keep_mask(X, 5, 0.4, SEED, False)
    assert torch.equal(keep, generator_keep_mask(SEED, 0.4, 6, 5))
    assert torch.equal(composition.keep_mask(X, 5, 0.4, SEED, True), philox_keep_mask(SEED, 0.4, 6, 5))
    assert composition.keep_mask(X, 5, 0.4, None, True) is None
    seeds = torch.tensor([[5, 0], [6, 0]])
    kept = torch.func.vmap(lambda seed: composition.keep_mask(X, 5, 0.4, seed, False))(seeds)
    assert torch.equal(kept[1], philox_keep_mask(seeds[1], 0.4, 6, 5))


def test_vmaps_randomness_means_what_it_means_for_nn_dropout():
    layer = lk.LoRALinear(8, 6, r=2, lora_dropout=0.5)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 8).expand(4, 3, 8)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(layer)(x)
    same = torch.func.vmap(layer, randomness="same")(x)
    torch.testing.assert_close(same, same[:1].expand_as(same))
    other = torch.func.vmap(layer, randomness="different")(x)
    assert not torch.allclose(other[0], other[1])
    torch.func.vmap(copy.deepcopy(layer).eval())(x)


def test_a_seed_is_as_good_under_vmap_as_without():
    W, A, B, X = torch.randn(5, 8), torch.randn(2, 8), torch.randn(5, 2), torch.randn(3, 4, 8)

    def run(X):
        return lk.lora_linear(X, W, A, B, dropout_p=0.5, seed=3)

    torch.testing.assert_close(torch.func.vmap(run)(X), torch.stack([run(x) for x in X]))


def test_transforms_inside_a_compiled_graph():
    layer = lk.DoRALinear(8, 6, r=2)
    torch.nn.init.normal_(layer.lora_B, std=0.3)
    x = torch.randn(3, 8)

    def gradient(x):
        return torch.func.grad(lambda x: layer(x).square().sum())(x)

    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), gradient(x))
