"""lk.multi_lora_linear: gradients, shapes of ids, autocast, compile; refusals: tests/kernels/multi/test_refused.py."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.testing import assert_close
from lora_kernels.testing.multi import make_multi_problem, mix_ids, multi_plain, multi_truth

RANKS = (4, 0, 7, 1)


def problem(dtype=torch.float32, M=24, **options):
    return make_multi_problem(mix_ids("uniform", M, len(RANKS), seed=2), 20, 28, RANKS, dtype, **options)


def leaves(p):
    bias = None if p.bias is None else p.bias.clone().requires_grad_()
    return p.X.clone().requires_grad_(), p.slots.A.clone().requires_grad_(), p.slots.B.clone().requires_grad_(), bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pool_layout", [False, True])
def test_forward_and_gradients_by_the_rule(dtype, pool_layout):
    p = problem(dtype, M=200, pool_layout=pool_layout)
    X, A, B, bias = leaves(p)
    Y = lk.multi_lora_linear(X, p.W, p.slots._replace(A=A, B=B), p.ids, bias)
    Y.backward(p.dY)
    for name, got, plain, truth in zip(
        ("Y", "dX", "dA", "dB", "dbias"), (Y, X.grad, A.grad, B.grad, bias.grad), multi_plain(p), multi_truth(p),
        strict=True,
    ):  # fmt: skip
        assert_close(got.detach(), plain, truth, what=name)


def test_gradcheck_in_float64():
    p = problem(torch.float64, M=7)
    X, A, B, bias = leaves(p)
    assert torch.autograd.gradcheck(
        lambda X, A, B, bias: lk.multi_lora_linear(X, p.W, p.slots._replace(A=A, B=B), p.ids, bias), (X, A, B, bias)
    )


def test_adapters_given_one_by_one_train_as_each_alone():
    p = problem(torch.float64)
    A = [torch.randn(r, 28, dtype=torch.float64).requires_grad_() for r in (4, 2)]
    B = [torch.randn(20, r, dtype=torch.float64).requires_grad_() for r in (4, 2)]
    ids = mix_ids("uniform", 24, 2, seed=1)
    lk.multi_lora_linear(p.X, p.W, (A, B, None, [0.5, 2.0]), ids).backward(p.dY)
    for slot, s in enumerate((0.5, 2.0)):
        rows = ids == slot
        a, b = A[slot].detach().clone().requires_grad_(), B[slot].detach().clone().requires_grad_()
        lk.lora_linear(p.X[rows], p.W, a, b, scaling=s).backward(p.dY[rows])
        assert torch.allclose(A[slot].grad, a.grad, rtol=1e-12)
        assert torch.allclose(B[slot].grad, b.grad, rtol=1e-12)


def test_ids_a_token_and_ids_a_sequence():
    p = problem()
    X = p.X.view(4, 6, 28)
    ids = torch.tensor([2, -1, 0, 3])
    whole = lk.multi_lora_linear(X, p.W, p.slots, ids, p.bias)
    assert whole.shape == (4, 6, 20)
    each = lk.multi_lora_linear(X, p.W, p.slots, ids[:, None].expand(4, 6), p.bias)
    flat = lk.multi_lora_linear(p.X, p.W, p.slots, ids.repeat_interleave(6).int(), p.bias)
    assert torch.equal(whole, each)
    assert torch.equal(whole.view(24, 20), flat)
    one = lk.multi_lora_linear(X[0, 0], p.W, p.slots, torch.tensor(2), p.bias)
    assert torch.allclose(one, flat[0], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_by_the_rule(dtype):
    p = problem(dtype)
    with torch.no_grad():
        quiet = lk.multi_lora_linear(p.X, p.W, p.slots, p.ids, p.bias)
    assert_close(quiet, multi_plain(p).Y, multi_truth(p).Y)


def test_an_output_can_be_changed_in_place():
    p = problem()
    X = p.X.view(4, 6, 28).clone().requires_grad_()
    Y = lk.multi_lora_linear(X, p.W, p.slots, p.ids.view(4, 6), p.bias)
    Y += X.sum()
    Y.sum().backward()
    assert X.grad is not None


def test_no_rows_and_no_adapter_at_all():
    p = problem()
    empty = p.X[:0].requires_grad_()
    Y = lk.multi_lora_linear(empty, p.W, p.slots, p.ids[:0], p.bias)
    Y.sum().backward()
    assert Y.shape == (0, 20)
    none = lk.multi_lora_linear(p.X, p.W, p.slots, torch.full((24,), -1), p.bias)
    assert torch.equal(none, torch.nn.functional.linear(p.X, p.W, p.bias))


def test_autocast_takes_its_dtype():
    p = problem()
    with torch.autocast("cpu", torch.bfloat16):
        Y = lk.multi_lora_linear(p.X, p.W, p.slots, p.ids, p.bias)
    assert Y.dtype == torch.bfloat16
    low = make_multi_problem(p.ids, 20, 28, RANKS, torch.bfloat16)
    assert_close(Y, multi_plain(low).Y, multi_truth(low).Y)


def test_compiles_whole_and_another_mix_compiles_nothing():
    p = problem()
    compiled = torch.compile(
        lambda X, A, B, ids: lk.multi_lora_linear(X, p.W, p.slots._replace(A=A, B=B), ids, p.bias),
        fullgraph=True,
        backend="aot_eager",
    )
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            ids = mix_ids("uniform", 24, len(RANKS), seed=seed)
            X, A, B, _ = leaves(p)
            Y = compiled(X, A, B, ids)
            Y.backward(p.dY)
            eager = lk.multi_lora_linear(p.X, p.W, p.slots, ids, p.bias)
            assert torch.allclose(Y, eager, atol=1e-6)
            assert A.grad is not None
