"""lora_linear_stacked as a differentiable function: gradients, what is saved, what is refused, torch.compile."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.errors import ConfigError, FrozenWeightError, ShapeError
from lora_kernels.testing import assert_close
from lora_kernels.testing.stacked import make_stacked, plain_stacked, truth_stacked


def projections_of(problems):
    """Projections over the problems' tensors; A, B and the biases ask for gradients."""

    def leaf(t):
        return None if t is None else t.detach().clone().requires_grad_()

    return [lk.Projection(q.W, leaf(q.A), leaf(q.B), leaf(q.bias), q.scaling) for q in problems]


def small(dtype=torch.float64, device="cpu", M=5, K=7, Ns=(6, 4, 3), ranks=(2, 1, 3)):
    problems = make_stacked(M, K, Ns, ranks, dtype, device, scalings=(1.7, 1.7, 0.6)[: len(Ns)])
    return problems[0].X.clone().requires_grad_(), projections_of(problems)


def leaves(X, projections):
    return [X, *(t for q in projections for t in (q.A, q.B, q.bias) if t is not None)]


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(p):
    X, projections = small()
    flat = leaves(X, projections)

    def f(*_):
        return lk.lora_linear_stacked(X, projections, dropout_p=p, seed=11)

    assert torch.autograd.gradcheck(f, flat)


@pytest.mark.parametrize("backend", ["reference", "triton:eager", "triton:shrink_extend"])
def test_gradients_by_the_error_rule(backend, device):
    problems = make_stacked(48, 56, (40, 24), (8, 4), torch.bfloat16, device, adjacent=True)
    X, projections = problems[0].X.clone().requires_grad_(), projections_of(problems)
    for q, like in zip(projections, problems, strict=True):
        assert q.W is like.W  # adjacent, as they were made
    Y = lk.lora_linear_stacked(X, projections, backend=backend)
    torch.autograd.backward(Y, [q.dY for q in problems])
    got = {"Y0": Y[0], "Y1": Y[1], "dX": X.grad, "dbias0": projections[0].bias.grad}
    for i, q in enumerate(projections):
        got |= {f"dA{i}": q.A.grad, f"dB{i}": q.B.grad}
    expected, true = plain_stacked(problems), truth_stacked(problems)
    assert got.keys() == true.keys()
    for name in true:
        assert_close(got[name], expected[name], true[name], what=name)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_is_what_separate_layers_with_one_seed_give(backend, device):
    X, projections = small(torch.float32, device, M=12)
    X = X.detach().view(2, 6, 7).requires_grad_()
    flat = leaves(X, projections)
    Y = lk.lora_linear_stacked(X, projections, dropout_p=0.4, seed=3, backend=backend)
    apart = [lk.lora_linear(X, *q[:4], scaling=q.scaling, dropout_p=0.4, seed=3, backend=backend) for q in projections]
    for y, expected in zip(Y, apart, strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for use in ([0, 1, 2], [1], [0, 2]):  # an unused output has no gradient at all
        dY = [torch.randn_like(Y[i]) for i in use]
        got = torch.autograd.grad([Y[i] for i in use], flat, dY, allow_unused=True, retain_graph=True)
        expected = torch.autograd.grad([apart[i] for i in use], flat, dY, allow_unused=True, retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_an_unused_projection_costs_the_backward_nothing(monkeypatch):
    from lora_kernels.ops import lora_linear_stacked as ops

    X, projections = small()
    seen = []
    direct = ops.lora_linear_stacked_bwd
    monkeypatch.setattr(ops, "lora_linear_stacked_bwd", lambda dY, *args: seen.append(len(dY)) or direct(dY, *args))
    Y = lk.lora_linear_stacked(X, projections)
    torch.autograd.grad(Y[1].sum(), [X, projections[1].A])
    assert seen == [1]


@pytest.mark.parametrize("frozen", ["X", "A", "B", "bias"])
def test_frozen_operands_get_no_gradient(frozen):
    X, projections = small()
    if frozen == "X":
        X = X.detach()
    else:
        projections[0] = projections[0]._replace(**{frozen: getattr(projections[0], frozen).detach()})
    flat = [t for t in leaves(X, projections) if t.requires_grad]
    sum(y.sum() for y in lk.lora_linear_stacked(X, projections)).backward()
    assert all(t.grad is not None for t in flat)


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (2, 0, 7)], ids=str)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_leading_dimensions(shape, backend, device):
    _, projections = small(torch.float32, device)
    X = torch.randn(shape, device=device, requires_grad=True)
    Y = lk.lora_linear_stacked(X, projections, backend=backend)
    assert [y.shape for y in Y] == [(*shape[:-1], N) for N in (6, 4, 3)]
    Y[0].mul_(2)  # in place, as after layers of their own
    sum(y.sum() for y in Y).backward()
    assert X.grad.shape == X.shape
    with torch.no_grad():
        for y, again in zip(Y[1:], lk.lora_linear_stacked(X, projections, backend=backend)[1:], strict=True):
            torch.testing.assert_close(y, again)


def test_saves_x_once_and_xa(device):
    M, K, ranks = 256, 128, (8, 4)
    problems = make_stacked(M, K, (64, 32), ranks, torch.float32, device)
    X, projections = problems[0].X.clone().requires_grad_(), projections_of(problems)
    given = {t.untyped_storage().data_ptr() for q in projections for t in (q.W, q.A, q.B)}
    saved = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in given:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    bits = M * 16  # K / 8 bytes a row
    for p, backend, mask, extra in (
        (0.0, "reference", "bits", 0),
        (0.1, "reference", "bits", 16),  # seed and offset
        (0.1, "triton", "bits", 16 + bits),
        (0.1, "triton", "seed", 16),
    ):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            lk.lora_linear_stacked(X, projections, dropout_p=p, backend=backend, dropout_mask=mask)
        assert sum(saved.values()) == X.nbytes + M * sum(ranks) * 4 + extra


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole(backend):
    X, projections = small(torch.float32)
    flat = leaves(X, projections)

    def f(X):
        return sum(y.square().sum() for y in lk.lora_linear_stacked(X, projections, dropout_p=0.3, seed=4))

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend=backend)
    for a, b in zip(torch.autograd.grad(f(X), flat), torch.autograd.grad(compiled(X), flat), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_autocast(device):
    X, projections = small(torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        Y = lk.lora_linear_stacked(X, projections)
    assert all(y.dtype == torch.bfloat16 for y in Y)
    Y[0].float().sum().backward()
    assert X.grad.dtype == projections[0].A.grad.dtype == torch.float32


def test_what_does_not_fit_is_refused():
    X, (q, k, v) = small()
    with pytest.raises(ShapeError, match="one Projection or more"):
        lk.lora_linear_stacked(X, [])
    with pytest.raises(ShapeError, match="must share a dtype"):
        lk.lora_linear_stacked(X, [q, k._replace(A=k.A.float(), B=k.B.float())])
    with pytest.raises(ShapeError, match="do not fit"):
        lk.lora_linear_stacked(X, [q, v._replace(W=v.W[:, 1:])])
    with pytest.raises(FrozenWeightError):
        lk.lora_linear_stacked(X, [q, v._replace(W=v.W.clone().requires_grad_())])
    with pytest.raises(ConfigError, match="probability"):
        lk.lora_linear_stacked(X, [q], dropout_p=1.5)
    with pytest.raises(ConfigError, match="dropout_mask"):
        lk.lora_linear_stacked(X, [q], dropout_mask="byte")
