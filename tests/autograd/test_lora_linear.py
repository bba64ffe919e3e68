"""lora_linear as a differentiable function: gradients, what is saved, what is refused, PyTorch's transformations."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels import reference
from lora_kernels.errors import BackendUnavailableError, ConfigError, FrozenWeightError, ShapeError
from lora_kernels.testing import assert_close, make_problem, plain, truth


def leaves(problem):
    X, A, B, bias = (t.detach().clone().requires_grad_() for t in (problem.X, problem.A, problem.B, problem.bias))
    return X, problem.W, A, B, bias


def small(dtype=torch.float64, M=5, N=6, K=7, r=2, device="cpu"):
    return leaves(make_problem(M, N, K, r, dtype, device))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(p):
    X, W, A, B, bias = small()

    def f(X, A, B, bias):
        return lk.lora_linear(X, W, A, B, bias, scaling=1.7, dropout_p=p, seed=11)

    assert torch.autograd.gradcheck(f, (X, A, B, bias))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients_by_the_error_rule(dtype, backend, device):
    problem = make_problem(48, 40, 56, 8, dtype, device)
    X, W, A, B, bias = leaves(problem)
    Y = lk.lora_linear(X, W, A, B, bias, scaling=problem.scaling, backend=backend)
    Y.backward(problem.dY)
    expected, true = plain(problem), truth(problem)
    for name, got in (("Y", Y), ("dX", X.grad), ("dA", A.grad), ("dB", B.grad), ("dbias", bias.grad)):
        assert_close(got, getattr(expected, name), getattr(true, name), what=name)


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (0, 7), (2, 0, 7)], ids=str)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_leading_dimensions(shape, backend, device):
    _, W, A, B, bias = small(torch.float32, device=device)
    X = torch.randn(shape, device=device, requires_grad=True)
    Y = lk.lora_linear(X, W, A, B, bias, scaling=2.0, backend=backend)
    assert Y.shape == (*shape[:-1], 6)
    Y.sum().backward()
    assert X.grad.shape == X.shape
    assert A.grad.shape == A.shape
    torch.testing.assert_close(Y, X @ W.T + bias + 2.0 * (X @ A.T) @ B.T)


def test_a_seed_fixes_the_mask_and_manual_seed_the_run():
    X, W, A, B, bias = small(M=64, K=64)

    def y(**how):
        return lk.lora_linear(X, W, A, B, bias, dropout_p=0.5, **how)

    assert torch.equal(y(seed=3), y(seed=3))
    assert not torch.equal(y(seed=3), y(seed=4))
    assert torch.equal(y(seed=torch.tensor([3, 0])), y(seed=3))
    torch.manual_seed(0)
    first = y()
    assert not torch.equal(first, y())
    torch.manual_seed(0)
    assert torch.equal(first, y())
    assert torch.equal(y(training=False), lk.lora_linear(X, W, A, B, bias))


def test_dropout_acts_on_the_adapter_branch_only():
    X, W, A, B, bias = small(M=200, K=64)
    Y = lk.lora_linear(X, W, A, B, bias, dropout_p=1.0)
    torch.testing.assert_close(Y, torch.nn.functional.linear(X, W, bias))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_same_mask_forward_and_backward_and_after_recomputation(backend, device):
    X, W, A, B, bias = small(torch.float32, M=40, K=64, device=device)

    def block(X):
        return lk.lora_linear(X, W, A, B, bias, dropout_p=0.5, scaling=2.0, backend=backend).square()

    def grads(f):
        torch.manual_seed(5)
        f(X).sum().backward()
        made = [t.grad for t in (X, A, B, bias)]
        for t in (X, A, B, bias):
            t.grad = None
        return made

    direct = grads(block)
    for reentrant in (False, True):
        again = grads(lambda X, reentrant=reentrant: checkpoint(block, X, use_reentrant=reentrant))
        assert all(torch.equal(a, b) for a, b in zip(direct, again, strict=True))
    # the gradient is that of the very mask the forward drew: Y is affine in A for a fixed mask
    torch.manual_seed(5)
    Y = lk.lora_linear(X, W, A, B, bias, dropout_p=0.5, scaling=2.0, backend=backend)
    (dA,) = torch.autograd.grad(Y.sum(), A)
    torch.manual_seed(5)
    zero = lk.lora_linear(X, W, torch.zeros_like(A), B, bias, dropout_p=0.5, scaling=2.0, backend=backend)
    torch.testing.assert_close((Y - zero).sum(), (dA * A).sum(), rtol=1e-4, atol=1e-4)


def test_saves_x_and_xa_and_nothing_else():
    X, W, A, B, bias = small(torch.float32, M=1024, N=256, K=512, r=8)
    frozen = {t.untyped_storage().data_ptr() for t in (W, A, B)}
    saved = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in frozen:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    for p, extra in ((0.0, 0), (0.1, 16)):  # dropout adds its seed and offset
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            lk.lora_linear(X, W, A, B, bias, dropout_p=p)
        assert sum(saved.values()) == X.nbytes + 1024 * 8 * 4 + extra


def test_given_and_saved_tensors_are_never_written():
    X, W, A, B, bias = small(torch.float32)
    before = [t.detach().clone() for t in (X, W, A, B, bias)]
    Y = lk.lora_linear(X, W, A, B, bias, dropout_p=0.3, seed=1)
    dY = torch.randn_like(Y)
    kept = dY.clone()
    first = torch.autograd.grad(Y, (X, A, B), dY, retain_graph=True)
    second = torch.autograd.grad(Y, (X, A, B), dY)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (X, W, A, B, bias), strict=True))
    assert torch.equal(dY, kept)


def test_autocast_matches_a_linear_layer_of_peft_form():
    X, W, A, B, bias = small(torch.float32, M=32, N=24, K=40, r=4)
    with torch.autocast("cpu", torch.bfloat16):
        Y = lk.lora_linear(X, W, A, B, bias, scaling=2.0)
        F = torch.nn.functional
        expected = F.linear(X, W, bias) + 2.0 * F.linear(F.linear(X, A), B)
    assert Y.dtype == torch.bfloat16
    torch.testing.assert_close(Y, expected, rtol=2e-2, atol=2e-2)
    Y.sum().backward()
    assert X.grad.dtype == A.grad.dtype == B.grad.dtype == bias.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compiles_whole(backend, device):
    X, W, A, B, bias = small(torch.float32, device=device)

    def f(X):
        return lk.lora_linear(X, W, A, B, bias, scaling=2.0, dropout_p=0.5, seed=3, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    direct = torch.autograd.grad(f(X).square().sum(), (X, A, B, bias))
    traced = torch.autograd.grad(compiled(X).square().sum(), (X, A, B, bias))
    for a, b in zip(direct, traced, strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_with_inductor():
    X, W, A, B, bias = small(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda X: lk.lora_linear(X, W, A, B, bias) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(X), lk.lora_linear(X, W, A, B, bias) * 2)


def test_a_trainable_base_is_refused_with_the_remedy():
    X, W, A, B, bias = small()
    with pytest.raises(FrozenWeightError, match=r"requires_grad_\(False\)"):
        lk.lora_linear(X, W.clone().requires_grad_(), A, B, bias)


BAD = {
    "X too narrow": lambda X, W, A, B, b: (X[:, :-1], W, A, B, b),
    "A transposed": lambda X, W, A, B, b: (X, W, A.T, B, b),
    "B of another rank": lambda X, W, A, B, b: (X, W, A, B[:, :1], b),
    "rank 0": lambda X, W, A, B, b: (X, W, A[:0], B[:, :0], b),
    "bias too long": lambda X, W, A, B, b: (X, W, A, B, torch.cat((b, b))),
    "X scalar": lambda X, W, A, B, b: (X[0, 0], W, A, B, b),
    "X integer": lambda X, W, A, B, b: (X.long(), W, A, B, b),
    "X of another dtype": lambda X, W, A, B, b: (X.bfloat16(), W, A, B, b),
    "bias of another dtype": lambda X, W, A, B, b: (X, W, A, B, b.bfloat16()),
    "W a vector": lambda X, W, A, B, b: (X, W[0], A, B, b),
    "W on another device": lambda X, W, A, B, b: (X, W.to("meta"), A, B, b),
}


@pytest.mark.parametrize("what", BAD)
def test_operands_that_do_not_fit(what):
    with pytest.raises(ShapeError, match=r"expected|accepted|must"):
        lk.lora_linear(*BAD[what](*(t.detach() for t in small())))


def test_bad_settings():
    operands = small()
    for p in (-0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="probability"):
            lk.lora_linear(*operands, dropout_p=p)
    with pytest.raises(ConfigError, match="accepted are"):
        lk.lora_linear(*operands, backend="tritium")
    with pytest.raises(ShapeError, match="int64"):
        lk.lora_linear(*operands, dropout_p=0.5, seed=torch.tensor([1.0]))
    with pytest.raises(BackendUnavailableError, match="float64"):
        lk.lora_linear(*operands, backend="triton")


def test_the_reference_alone_answers_where_triton_is_missing(monkeypatch):
    from lora_kernels.planning import choose as plan

    monkeypatch.setattr(plan, "triton_missing", lambda device_type: "the package triton is not installed")
    operands = small(torch.float32)
    Y = lk.lora_linear(*operands)
    expected, _ = reference.lora_linear_fwd(*(t.detach() for t in operands), 1.0)
    assert torch.equal(Y, expected)
    with pytest.raises(BackendUnavailableError, match=r"not installed.*reference"):
        lk.lora_linear(*operands, backend="triton")
