"""The DoRA reference against autograd of PEFT's expression, in float64 and by the rule."""

import pytest
import torch

from lora_kernels.reference import GradMask
from lora_kernels.reference.dora_linear import (
    DoRANeeds,
    column_dots,
    dora_linear_bwd,
    dora_linear_fwd,
    magnitude_scale,
    scale_columns,
)
from lora_kernels.reference.weight_norm import weight_norm
from lora_kernels.testing import MAGNITUDES, assert_close, make_problem
from lora_kernels.testing.problems import lora_dtype

ALL = DoRANeeds(True, True, True, True, True)
NAMES = ("Y", "dX", "dA", "dB", "dm", "dbias")


def magnitude(problem, seed=7):
    """A magnitude from half to twice the norm, so that both terms of the forward weigh."""
    factor = torch.rand(problem.W.shape[0], generator=torch.Generator().manual_seed(seed)) * 1.5 + 0.5
    norm = weight_norm(problem.W, problem.A, problem.B, problem.scaling)
    return (norm * factor.to(norm)).to(problem.A.dtype)


def differentiated(problem, m, keep, dtype):
    """Y and the gradients by autograd of what PEFT computes: all in ``dtype``, but float32 adapters over float16.

    There PEFT widens the dropped base product, too, which costs a product over W in float32; here it stays 16 bit.
    """
    X, bias = (t.detach().to(dtype).requires_grad_() for t in (problem.X, problem.bias))
    adapters_in = lora_dtype(dtype, problem.A.dtype)
    A, B, m = (t.detach().to(adapters_in).requires_grad_() for t in (problem.A, problem.B, m))
    W, s = problem.W.to(dtype), problem.scaling
    wide = lora_dtype(dtype, A.dtype)  # of x, as PEFT casts it to the adapter's
    g = m / torch.linalg.norm(W.to(wide) + s * (B @ A).to(wide), dim=1).to(wide).detach()
    result = X @ W.t() + bias
    if keep is None:
        XD, base = X.to(wide), result - bias
    else:
        XD = X * keep.to(dtype) / (1 - problem.p)
        base, XD = XD @ W.t(), XD.to(wide)
    Y = (result + (g - 1) * base + g * (XD @ A.t() @ B.t()) * s).to(dtype)
    return Y.detach(), *torch.autograd.grad(Y, (X, A, B, m, bias), problem.dY.to(dtype))


def run(problem, m, keep, needs=ALL):
    operands = problem.X, problem.W, problem.A, problem.B, m
    norm = weight_norm(problem.W, problem.A, problem.B, problem.scaling)
    rest = problem.scaling, keep, problem.p
    Y, XA, Z = dora_linear_fwd(*operands, norm, problem.bias, *rest, keep_z=needs.m)
    return Y, *dora_linear_bwd(problem.dY, *operands, norm, XA, Z, *rest, needs)


def mask(problem):
    gen = torch.Generator().manual_seed(1)
    return torch.rand(problem.X.shape, generator=gen) >= problem.p if problem.p else None


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("strided", [False, True])
def test_equals_autograd_in_float64(p, strided):
    problem = make_problem(7, 11, 13, 3, torch.float64, dropout_p=p, strided=strided)
    m, keep = magnitude(problem), mask(problem)
    want = differentiated(problem, m, keep, torch.float64)
    for name, got, true in zip(NAMES, run(problem, m, keep), want, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_by_the_rule(dtype, p):
    for shape in ((96, 80, 112, 16), (200, 300, 64, 4)):
        problem = make_problem(*shape, dtype, dropout_p=p)
        m, keep = magnitude(problem), mask(problem)
        plain, truth = (differentiated(problem, m, keep, d) for d in (dtype, torch.float64))
        for name, got, near, true in zip(NAMES, run(problem, m, keep), plain, truth, strict=True):
            assert_close(got, near, true, what=f"{name} {dtype} {shape}")


@pytest.mark.parametrize("sizes", MAGNITUDES, ids=lambda sizes: sizes.name)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_float16_beyond_its_own_range(p, sizes):
    problem = make_problem(96, 80, 112, 16, torch.float16, adapter_dtype=torch.float32, dropout_p=p, magnitudes=sizes)
    m, keep = magnitude(problem), mask(problem)
    plain, truth = (differentiated(problem, m, keep, d) for d in (torch.float16, torch.float64))
    for name, got, near, true in zip(NAMES, run(problem, m, keep), plain, truth, strict=True):
        assert_close(got, near, true, what=f"{name} {sizes.name}", dtype=torch.float16)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_no_rows(p):
    problem = make_problem(0, 5, 4, 2, torch.float32, dropout_p=p)
    Y, dX, *grads = run(problem, magnitude(problem), mask(problem))
    assert Y.shape == (0, 5)
    assert dX.shape == (0, 4)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_makes_only_what_is_needed(p):
    problem = make_problem(6, 5, 4, 2, torch.float32, dropout_p=p)
    m, keep = magnitude(problem), mask(problem)
    whole = dict(zip(DoRANeeds._fields, run(problem, m, keep)[1:], strict=True))
    for name in DoRANeeds._fields:
        needs = DoRANeeds(*(field == name for field in DoRANeeds._fields))
        for field, grad in zip(DoRANeeds._fields, run(problem, m, keep, needs)[1:], strict=True):
            assert (grad is None) == (field != name)
            assert grad is None or torch.equal(grad, whole[name])


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_never_writes_into_what_it_is_given(p):
    problem = make_problem(6, 5, 4, 2, torch.float32, dropout_p=p)
    given = (problem.X, problem.W, problem.A, problem.B, problem.bias, problem.dY, magnitude(problem))
    before = [t.clone() for t in given]
    run(problem, given[-1], mask(problem))
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))


def test_lora_is_dora_with_the_norm_as_magnitude():
    from lora_kernels.reference import lora_linear_bwd, lora_linear_fwd

    problem = make_problem(6, 5, 4, 2, torch.float64)
    norm = weight_norm(problem.W, problem.A, problem.B, problem.scaling)
    Y, *grads = run(problem, norm, None)
    lora, XA = lora_linear_fwd(problem.X, problem.W, problem.A, problem.B, problem.bias, problem.scaling)
    needs = GradMask(True, True, True, True)
    want = lora_linear_bwd(problem.dY, problem.X, problem.W, problem.A, problem.B, XA, problem.scaling, needs=needs)
    torch.testing.assert_close(Y, lora)
    for got, grad in zip((grads[0], grads[1], grads[2], grads[4]), want, strict=True):
        torch.testing.assert_close(got, grad)


def test_the_scale_is_applied_before_rounding():
    Z, bias = torch.randn(40, 30).bfloat16(), torch.randn(30).bfloat16()
    g = magnitude_scale(torch.rand(30) + 0.5, torch.rand(30) + 0.5)
    exact = (Z.double() * g.double() + bias.double()).bfloat16()
    assert (scale_columns(Z, g, bias) == exact).double().mean() > 0.999  # float32's own rounding is the rest
    kept = Z.clone()
    assert torch.equal(scale_columns(Z, g, bias, out=Z), scale_columns(kept, g, bias))


def test_column_dots_by_blocks():
    P, Q = torch.randn(3000, 200), torch.randn(3000, 200)
    assert_close(column_dots(P, Q), (P * Q).sum(0), (P.double() * Q.double()).sum(0))
    P, Q = P.bfloat16(), Q.bfloat16()
    assert_close(column_dots(P, Q), (P.float() * Q.float()).sum(0), (P.double() * Q.double()).sum(0))
