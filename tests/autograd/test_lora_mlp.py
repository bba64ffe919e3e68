"""lora_mlp as a differentiable function: gradients, the bytes it saves, what is refused, torch.compile."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.errors import ConfigError, ShapeError
from lora_kernels.testing.stacked import make_mlp


def operands(dtype=torch.float64, device="cpu", M=5, K=7, F=9, N=6, ranks=(2, 1, 3)):
    problems = make_mlp(M, K, F, N, ranks, dtype, device)

    def leaf(t):
        return None if t is None else t.detach().clone().requires_grad_()

    projections = [lk.Projection(q.W, leaf(q.A), leaf(q.B), leaf(q.bias), q.scaling) for q in problems]
    return problems[0].X.clone().requires_grad_(), *projections


def leaves(X, *projections):
    return [X, *(t for q in projections for t in (q.A, q.B, q.bias) if t is not None)]


def separately(X, gate, up, down, p, seed, backend):
    def layer(X, q, seed):
        return lk.lora_linear(X, *q[:4], scaling=q.scaling, dropout_p=p, seed=seed, backend=backend)

    return layer(torch.nn.functional.silu(layer(X, gate, seed)) * layer(X, up, seed), down, seed + 1)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(p):
    args = operands()
    assert torch.autograd.gradcheck(lambda *_: lk.lora_mlp(*args, dropout_p=p, seed=11), leaves(*args))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_is_what_separate_layers_give(p, backend, device):
    X, *projections = operands(torch.float32, device, M=12)
    X = X.detach().view(2, 6, 7).requires_grad_()
    flat = leaves(X, *projections)
    Y = lk.lora_mlp(X, *projections, dropout_p=p, seed=torch.tensor([3, 0], device=device), backend=backend)
    apart = separately(X, *projections, p, torch.tensor([3, 0], device=device), backend)
    torch.testing.assert_close(Y, apart, rtol=1e-4, atol=1e-4)
    dY = torch.randn_like(Y)
    for a, b in zip(torch.autograd.grad(Y, flat, dY), torch.autograd.grad(apart, flat, dY), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("frozen", range(3))
def test_one_layer_frozen(frozen):
    X, *projections = operands()
    q = projections[frozen]
    projections[frozen] = lk.Projection(*(t if not isinstance(t, torch.Tensor) else t.detach() for t in q))
    flat = [t for t in leaves(X, *projections) if t.requires_grad]
    expected = torch.autograd.grad(separately(X, *projections, 0.0, 0, "reference").sum(), flat)
    for a, b in zip(torch.autograd.grad(lk.lora_mlp(X, *projections).sum(), flat), expected, strict=True):
        torch.testing.assert_close(a, b)


def saved_bytes(f, given):
    """Bytes kept for the backward, each storage once, of what is not in ``given``."""
    frozen = {t.untyped_storage().data_ptr() for t in given}
    saved = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in frozen:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        f()
    return sum(saved.values())


def test_saves_x_gate_up_and_the_low_rank_terms(device):
    M, K, F, ranks = 64, 128, 256, (8, 4, 2)
    X, *projections = operands(torch.float32, device, M=M, K=K, F=F, N=128, ranks=ranks)
    given = [t for q in projections for t in (q.W, q.A, q.B)]
    floor = 4 * M * (K + 2 * F + sum(ranks))
    bits = M * (K + F) // 8
    for p, backend, mask, extra in (
        (0.0, "reference", "bits", 0),
        (0.1, "reference", "bits", 32),  # two seeds and offsets
        (0.1, "triton", "bits", 32 + bits),
        (0.1, "triton", "seed", 32),
    ):
        how = {"dropout_p": p, "backend": backend, "dropout_mask": mask}
        assert saved_bytes(lambda how=how: lk.lora_mlp(X, *projections, **how), given) == floor + extra
    apart = saved_bytes(lambda: separately(X, *projections, 0.0, 0, "reference"), given)
    assert apart == floor + 2 * 4 * M * F  # silu(G), and H as down's input


def test_manual_seed_repeats_both_masks(device):
    X, *projections = operands(torch.float32, device, M=64)
    torch.manual_seed(0)
    first = lk.lora_mlp(X, *projections, dropout_p=0.5)
    assert not torch.equal(first, lk.lora_mlp(X, *projections, dropout_p=0.5))
    torch.manual_seed(0)
    assert torch.equal(first, lk.lora_mlp(X, *projections, dropout_p=0.5))
    assert torch.equal(
        lk.lora_mlp(X, *projections, dropout_p=0.5, training=False), lk.lora_mlp(X.detach(), *projections)
    )


@pytest.mark.parametrize("shape", [(7,), (0, 7), (2, 3, 7)], ids=str)
def test_leading_dimensions(shape, device):
    _, *projections = operands(torch.float32, device)
    X = torch.randn(shape, device=device, requires_grad=True)
    Y = lk.lora_mlp(X, *projections, backend="triton", dropout_p=0.1)
    assert Y.shape == (*shape[:-1], 6)
    Y.sum().backward()
    assert X.grad.shape == X.shape
    with torch.no_grad():
        assert lk.lora_mlp(X, *projections).shape == Y.shape


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compiles_whole(p):
    X, *projections = operands(torch.float32)
    flat = leaves(X, *projections)

    def f(X):
        return lk.lora_mlp(X, *projections, dropout_p=p, seed=4).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(f(X), flat), torch.autograd.grad(compiled(X), flat), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused():
    X, gate, up, down = operands()
    with pytest.raises(ShapeError, match="same shape"):
        lk.lora_mlp(X, gate, up._replace(W=up.W[:-1], B=up.B[:-1]), down)
    with pytest.raises(ShapeError, match="do not fit"):
        lk.lora_mlp(X, gate, up, gate)
    with pytest.raises(ShapeError, match="one dtype"):
        lk.lora_mlp(X, gate, up, down._replace(A=down.A.float(), B=down.B.float()))
    with pytest.raises(ConfigError, match="dropout_mask"):
        lk.lora_mlp(X, gate, up, down, dropout_mask="byte")
