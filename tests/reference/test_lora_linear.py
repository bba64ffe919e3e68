"""The reference against autograd of the plain expression, in fp64."""

import pytest
import torch

from lora_kernels.reference import GradMask, lora_linear_bwd, lora_linear_fwd
from lora_kernels.testing import MAGNITUDES, assert_close, make_problem, plain, truth

ALL = GradMask(True, True, True, True)


def run(problem, keep, dtype=None):
    cast = (lambda t: t) if dtype is None else (lambda t: t.to(dtype))
    X, W, A, B, bias, dY = (cast(t) for t in (problem.X, problem.W, problem.A, problem.B, problem.bias, problem.dY))
    Y, XA = lora_linear_fwd(X, W, A, B, bias, problem.scaling, keep, problem.p)
    return Y, *lora_linear_bwd(dY, X, W, A, B, XA, problem.scaling, keep, problem.p, ALL)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("strided", [False, True])
def test_equals_autograd_in_float64(p, strided):
    problem = make_problem(7, 11, 13, 3, torch.float64, dropout_p=p, strided=strided)
    keep = torch.rand(7, 13, generator=torch.Generator().manual_seed(1)) >= p if p else None
    true = truth(problem, keep)
    for got, expected in zip(run(problem, keep), (true.Y, true.dX, true.dA, true.dB, true.dbias), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=["same", "float32"])
def test_error_rule(dtype, adapter_dtype):
    problem = make_problem(96, 80, 112, 16, dtype, adapter_dtype=adapter_dtype)
    expected, true = plain(problem), truth(problem)
    names = ("Y", "dX", "dA", "dB", "dbias")
    for name, got in zip(names, run(problem, None), strict=True):
        assert_close(got, getattr(expected, name), getattr(true, name), what=name, dtype=dtype)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("sizes", MAGNITUDES, ids=lambda sizes: sizes.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sizes_beyond_16_bit_intermediates(dtype, sizes, p):
    for adapter_dtype in (torch.float32,) if sizes.wide else (torch.float32, dtype):
        q = make_problem(96, 80, 112, 16, dtype, adapter_dtype=adapter_dtype, magnitudes=sizes, dropout_p=p)
        keep = torch.rand(96, 112, generator=torch.Generator().manual_seed(1)) >= p if p else None
        expected, true = plain(q, keep), truth(q, keep)
        for name, got in zip(("Y", "dX", "dA", "dB", "dbias"), run(q, keep), strict=True):
            assert_close(got, getattr(expected, name), getattr(true, name), what=name, dtype=dtype)


def test_makes_only_what_is_needed():
    problem = make_problem(5, 6, 7, 2, torch.float64)
    _, XA = lora_linear_fwd(problem.X, problem.W, problem.A, problem.B, None, 2.0)
    for i in range(4):
        needs = GradMask(*(j == i for j in range(4)))
        grads = lora_linear_bwd(problem.dY, problem.X, problem.W, problem.A, problem.B, XA, 2.0, needs=needs)
        assert [grad is not None for grad in grads] == list(needs)


def test_everything_dropped_leaves_the_base():
    problem = make_problem(5, 6, 7, 2, torch.float64, dropout_p=1.0)
    keep = torch.zeros(5, 7, dtype=torch.bool)
    Y, dX, dA, dB, _ = run(problem, keep)
    torch.testing.assert_close(Y, torch.nn.functional.linear(problem.X, problem.W, problem.bias))
    torch.testing.assert_close(dX, problem.dY @ problem.W)
    assert dA.abs().max() == 0
    assert dB.abs().max() == 0
