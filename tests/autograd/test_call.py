"""How an autograd.Function is called, and how often a graph is compiled while the scaling changes."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lora_kernels import (
    ConfigError,
    LoRALinear,
    Projection,
    ShapeError,
    Slots,
    dora_linear,
    lora_linear,
    lora_linear_stacked,
    lora_mlp,
)
from lora_kernels.autograd.call import again, direct_apply, fold_scaling, transformed, vjp
from lora_kernels.autograd.lora_conv import lora_conv
from lora_kernels.autograd.lora_embedding import lora_embedding
from lora_kernels.testing import make_problem


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, calls):
        ctx.save_for_backward(x)
        calls.append(x)
        return x**3

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * dy, None


def test_direct_apply_is_apply():
    x, calls = torch.tensor([2.0], requires_grad=True), []
    y = direct_apply(Cube)(x, calls)
    assert len(calls) == 1
    assert y.grad_fn is not None
    assert torch.autograd.grad(y, x)[0] == 12.0


def test_transforms_forward_mode_and_gradients_of_gradients_are_seen():
    x = torch.ones(2, 3)
    assert not transformed()
    seen = []
    torch.func.vmap(lambda row: seen.append(transformed()) or row)(x)
    with torch.autograd.forward_ad.dual_level():
        seen.append(transformed())
    with torch.no_grad():
        seen.append(not again(x))
    seen.append(again(x))
    assert seen == [True] * 4


def test_vjp_is_the_gradient_of_each_operand_alone():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    y = x * 2  # computed from x: its part of the gradient is not x's
    made = vjp(lambda a, b: a * b, (x, y), (True, True), torch.ones_like(x))
    torch.testing.assert_close(made, [y, x])
    (second,) = torch.autograd.grad(made[0].sum(), x)
    torch.testing.assert_close(second, torch.full_like(x, 2.0))
    with torch.no_grad():
        once = vjp(lambda a, b: a * b, (x, y), (False, True), torch.ones_like(x))
    assert once[0] is None
    assert not once[1].requires_grad


def test_a_parameter_changed_after_the_forward_is_refused():
    ids, W = torch.tensor([1, 0]), torch.randn(4, 3)
    A, B = torch.randn(2, 4, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    y = lora_embedding(ids, W, A, B)
    with torch.no_grad():
        A.add_(1)
    torch.autograd.grad(y.sum(), (A, B), retain_graph=True)  # first gradients do not read A
    with pytest.raises(RuntimeError, match="changed in place after the forward"):
        torch.autograd.grad(y.sum(), (A, B), create_graph=True)


def test_folded_scaling_is_in_A():
    A = torch.randn(2, 3)
    folded, scaling = fold_scaling(A, 0.5)
    assert scaling == 1.0
    assert torch.equal(folded, 0.5 * A)


def test_a_changing_scaling_is_compiled_twice_at_most():
    layer = LoRALinear(8, 6, r=2)
    torch.nn.init.normal_(layer.lora_B)
    counter = CompileCounterWithBackend("aot_eager")
    compiled, x = torch.compile(layer, backend=counter, fullgraph=True), torch.randn(5, 8)
    for scaling in (2.0, 0.5, 1.0, 3.0, 0.25):
        layer.scaling = scaling
        layer.zero_grad()
        y = compiled(x)
        y.sum().backward()
        torch.testing.assert_close(y, x @ layer.merged_weight().t() + layer.bias)
        grad = scaling * layer.lora_B.sum(0)[:, None] * x.sum(0)
        torch.testing.assert_close(layer.lora_A.grad, grad)
    assert counter.frame_count <= 2


def test_a_layer_whose_parameter_was_exchanged_says_what_does_not_fit():
    layer = LoRALinear(8, 6, r=2)
    layer.lora_A = torch.nn.Parameter(torch.randn(3, 8))
    with pytest.raises(ShapeError, match="do not fit"):
        layer(torch.randn(4, 8))
    with pytest.raises(ShapeError, match="share one dtype"):
        LoRALinear(8, 6)(torch.randn(4, 8, dtype=torch.float64))


def _mlp(X, q):
    gate, up, down = Projection(q.W, q.A, q.B), Projection(q.W, q.A, q.B), Projection(q.W.t(), q.B.t(), q.A.t())
    return lora_mlp(X, gate, up, down)


@pytest.mark.parametrize(
    "call",
    [
        lambda X, q: lora_linear(X, q.W, q.A, q.B),
        lambda X, q: dora_linear(X, q.W, q.A, q.B, q.W.norm(dim=1)),
        lambda X, q: lora_embedding(torch.tensor([[[0, 1], [5, 2]]]), q.W, q.B.t(), q.A.t()),
        lambda X, q: lora_linear_stacked(X, [Projection(q.W, q.A, q.B), Projection(q.W, q.A, q.B)])[0],
        _mlp,
    ],
    ids=["lora_linear", "dora_linear", "lora_embedding", "lora_linear_stacked", "lora_mlp"],
)
def test_an_output_may_be_changed_in_place(call):
    q = make_problem(4, 6, 8, 2, torch.float32)
    X = torch.randn(1, 2, 2, 8, requires_grad=True)
    q.A.requires_grad_()
    q.B.requires_grad_()
    y = call(X, q)
    expected = torch.autograd.grad(call(X, q).mul(3).sum(), (q.A, q.B))
    y *= 3
    for got, want in zip(torch.autograd.grad(y.sum(), (q.A, q.B)), expected, strict=True):
        torch.testing.assert_close(got, want)


def _layer(X, q, s):
    layer = LoRALinear(8, 6, r=2, dtype=X.dtype)
    layer.scaling = s
    with torch.no_grad():
        for name in ("weight", "lora_A", "lora_B"):
            getattr(layer, name).copy_(getattr(q, {"weight": "W"}.get(name, name[-1])))
        layer.bias.zero_()
    return layer(X)


SCALED = {
    "lora_linear": lambda X, q, s: lora_linear(X, q.W, q.A, q.B, scaling=s),
    "dora_linear": lambda X, q, s: dora_linear(X, q.W, q.A, q.B, q.W.norm(dim=1), scaling=s),
    "lora_conv": lambda X, q, s: lora_conv(
        X[..., None], q.W[..., None], q.A[..., None], q.B[..., None], lora_bias=q.W[:, 0], scaling=s
    ),
    "lora_embedding": lambda X, q, s: lora_embedding(torch.tensor([0, 5, 2]), q.W, q.B.t(), q.A.t(), scaling=s),
    "lora_linear_stacked": lambda X, q, s: lora_linear_stacked(
        X, [Projection(q.W, q.A, q.B, None, s), Projection(q.W, q.A, q.B)]
    )[0],
    "gate": lambda X, q, s: _scaled_mlp(X, q, s, 1.0),
    "down": lambda X, q, s: _scaled_mlp(X, q, 1.0, s),
    "LoRALinear": _layer,
}


def _scaled_mlp(X, q, gate, down):
    first = Projection(q.W, q.A, q.B, None, gate)
    return lora_mlp(X, first, first, Projection(q.W.t(), q.B.t(), q.A.t(), None, down))


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_trained_scaling_has_its_gradient(name, shape):
    """By the slope between two values of it: they are in float64."""
    q = make_problem(4, 6, 8, 2, torch.float64)
    X = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scaling = torch.full(shape, 1.5, dtype=torch.float64, requires_grad=True)

    def value(s):
        return SCALED[name](X, q, s).square().sum()

    (got,) = torch.autograd.grad(value(scaling), scaling)
    if name == "dora_linear":  # its norm is a constant of the backward, as in PEFT
        assert got.item() != 0.0
        return
    h = 1e-5
    slope = (value(1.5 + h) - value(1.5 - h)).item() / (2 * h)
    assert got.item() == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("name", SCALED)
def test_numbers_of_other_types_are_the_same_scaling(name):
    q = make_problem(4, 6, 8, 2, torch.float32)
    X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    expected = SCALED[name](X, q, 2.0)
    for scaling in (2, np.float32(2), np.int64(2), Fraction(2)):
        assert torch.equal(SCALED[name](X, q, scaling), expected)
    for scaling in (torch.tensor(2.0), torch.tensor([2]), torch.tensor(2.0, dtype=torch.float64)):
        torch.testing.assert_close(SCALED[name](X, q, scaling), expected)


@pytest.mark.parametrize("name", SCALED)
def test_what_is_no_number_is_refused(name):
    q, X = make_problem(4, 6, 8, 2, torch.float32), torch.randn(4, 8)
    for scaling in (None, "2", 2j, [2.0], np.array([2.0, 3.0])):
        with pytest.raises(ConfigError, match="accepted are a real number and a tensor of one element"):
            SCALED[name](X, q, scaling)
    for scaling in (torch.ones(4, 1), torch.ones(6), torch.tensor(2j), torch.ones(0)):
        with pytest.raises(ShapeError, match="accepted are a number and a real tensor of one element"):
            SCALED[name](X, q, scaling)


def test_slots_take_no_trained_scaling():
    q = make_problem(4, 6, 8, 2, torch.float32)
    for scalings in ([torch.tensor(2.0, requires_grad=True)], torch.ones(1, requires_grad=True)):
        with pytest.raises(ConfigError, match="a scaling requires a gradient"):
            Slots.of([q.A], [q.B], None, scalings)
