"""lora_kernels.autograd.dora_linear.dora_linear: against autograd, under every wrapper, and what it keeps."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels.autograd.dora_linear import dora_linear
from lora_kernels.ops.weight_norm import NormCache, weight_norm
from lora_kernels.reference import generator_keep_mask
from lora_kernels.testing import assert_close, make_problem

NAMES = ("Y", "dX", "dA", "dB", "dm", "dbias")


def leaves(dtype=torch.float32, M=12, N=10, K=14, r=3, adapter=None):
    """X, W, A, B, m, bias; all but W ask for gradients."""
    q = make_problem(M, N, K, r, dtype, adapter_dtype=adapter)
    m = weight_norm(q.W, q.A, q.B, q.scaling) * torch.linspace(0.5, 2, N)
    X, A, B, m, bias = (t.clone().requires_grad_() for t in (q.X, q.A, q.B, m.to(q.A.dtype), q.bias))
    return X, q.W, A, B, m, bias


def pefts(X, W, A, B, m, bias, s, keep=None, p=0.0):
    g = m / torch.linalg.norm(W + s * (B @ A), dim=1).detach()
    result = X @ W.t() + bias
    XD, base = (X, result - bias) if keep is None else (X * keep / (1 - p), X * keep / (1 - p) @ W.t())
    return result + (g - 1) * base + g * (XD @ A.t() @ B.t()) * s


def grads(Y, args, seed=0):
    X, _, A, B, m, bias = args
    dY = torch.randn(Y.shape, generator=torch.Generator().manual_seed(seed)).to(Y.dtype)
    return Y.detach(), *torch.autograd.grad(Y, (X, A, B, m, bias), dY)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(12, 14), (3, 4, 14), (14,), (0, 14)])
def test_equals_pefts_expression_in_float64(p, shape):
    args = leaves(torch.float64)
    X = args[0].detach().flatten()[: torch.Size(shape).numel()].reshape(shape).requires_grad_()
    args = X, *args[1:]
    keep = generator_keep_mask(torch.tensor([5, 0]), p, X.numel() // 14, 14, X.dtype).view(shape) if p else None
    got = grads(dora_linear(*args, scaling=1.7, dropout_p=p, seed=5), args)
    for name, mine, true in zip(NAMES, got, grads(pefts(*args, 1.7, keep, p), args), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compiles_in_one_graph(dropout_p):
    args = leaves(M=24)
    direct = grads(dora_linear(*args, scaling=1.7, dropout_p=dropout_p, seed=3), args)
    cache = NormCache()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*args):
        return dora_linear(*args, scaling=1.7, dropout_p=dropout_p, seed=3, norms=cache)

    for name, mine, its in zip(NAMES, grads(compiled(*args), args), direct, strict=True):
        torch.testing.assert_close(mine, its, msg=name)
    with torch.no_grad():
        args[2].data.mul_(2)  # the graph computes norms, whatever a cache holds
    torch.testing.assert_close(compiled(*args), dora_linear(*args, scaling=1.7, dropout_p=dropout_p, seed=3))


def test_a_graph_is_not_compiled_again_for_every_scaling():
    args = leaves()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda s, *args: dora_linear(*args, scaling=s), fullgraph=True, backend=counter)
    for s in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0):
        torch.testing.assert_close(compiled(s, *args), dora_linear(*args, scaling=s))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_mask(reentrant):
    args = leaves()

    def run(wrap):
        torch.manual_seed(0)
        return grads(wrap(lambda X: dora_linear(X, *args[1:], scaling=1.7, dropout_p=0.5)), args)

    direct = run(lambda block: block(args[0]))
    again = run(lambda block: checkpoint(block, args[0], use_reentrant=reentrant)) if not reentrant else None
    if reentrant:  # its backward is a whole one: read .grad
        torch.manual_seed(0)
        Y = checkpoint(lambda X: dora_linear(X, *args[1:], scaling=1.7, dropout_p=0.5), args[0], use_reentrant=True)
        Y.backward(torch.randn(Y.shape, generator=torch.Generator().manual_seed(0)))
        again = Y.detach(), *(args[i].grad for i in (0, 2, 3, 4, 5))
    assert all(torch.equal(a, b) for a, b in zip(direct, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_in_its_dtype_with_exact_norms(dtype):
    args = leaves(M=96, N=64, K=80)
    with torch.autocast("cpu", dtype):
        Y = dora_linear(*args, scaling=1.7)
    assert Y.dtype == dtype
    true = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in args)
    plain = tuple(t.detach().to(dtype).requires_grad_(t.requires_grad) for t in args)
    truth, near = grads(pefts(*true, 1.7), true), grads(pefts(*plain, 1.7), plain)
    for name, mine, plainly, truly in zip(NAMES, grads(Y, args), near, truth, strict=True):
        assert_close(mine.to(dtype), plainly, truly, what=name)


def test_autocast_takes_the_norms_of_the_weight_as_it_is_stored():
    X, W, A, B, m, bias = leaves()
    seen = []

    class Watched(NormCache):
        def norm(self, W, *args):
            seen.append(W)
            return super().norm(W, *args)

    with torch.autocast("cpu", torch.bfloat16):
        dora_linear(X, W, A, B, m, bias, norms=Watched())
    assert seen[0] is W


def test_saves_x_xa_z_and_small_things():
    X, W, A, B, m, bias = leaves(M=1024, N=256, K=512, r=8)
    known = {t.untyped_storage().data_ptr() for t in (W, A, B, m)}
    saved = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    def kept(**options):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            dora_linear(X, W, A, B, m, bias, **options)
        return sum(saved.values())

    small = X.nbytes + 1024 * 8 * 4 + 256 * 4
    assert kept() == small + 1024 * 256 * 4
    assert kept(dropout_p=0.1) == small + 1024 * 256 * 4 + 16
    m.requires_grad_(False)
    assert kept() == small
    assert kept(dropout_p=0.1) == small + 16


def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same():
    args = leaves()
    whole = dict(zip(NAMES, grads(dora_linear(*args, scaling=1.7), args), strict=True))
    for i, name in ((0, "dX"), (2, "dA"), (3, "dB"), (4, "dm"), (5, "dbias")):
        alone = tuple(t.detach().requires_grad_(i == j) for j, t in enumerate(args))
        dora_linear(*alone, scaling=1.7).backward(torch.randn(12, 10, generator=torch.Generator().manual_seed(0)))
        assert torch.equal(alone[i].grad, whole[name])
        assert all(t.grad is None for j, t in enumerate(alone) if j != i)


def test_given_and_saved_tensors_are_never_written():
    args = leaves()
    before = [t.detach().clone() for t in args]
    Y = dora_linear(*args, dropout_p=0.3, seed=1)
    wanted = [t for t in args if t.requires_grad]
    dY = torch.randn_like(Y)
    kept = dY.clone()
    first = torch.autograd.grad(Y, wanted, dY, retain_graph=True)
    second = torch.autograd.grad(Y, wanted, dY)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, args, strict=True))
    assert torch.equal(dY, kept)


def test_the_output_may_be_changed_in_place():
    args = leaves()
    want = grads(dora_linear(*args, scaling=1.7).relu(), args)
    got = grads(torch.relu_(dora_linear(*args, scaling=1.7)), args)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_without_gradients_the_same_values():
    args = leaves()
    with torch.no_grad():
        bare = dora_linear(*args, scaling=1.7)
    with torch.inference_mode():
        inside = dora_linear(*args, scaling=1.7)
    assert torch.equal(bare, dora_linear(*args, scaling=1.7))
    assert torch.equal(bare, inside)
    evaluated = dora_linear(*args, scaling=1.7, dropout_p=0.5, training=False)
    assert torch.equal(bare, evaluated)


def test_a_cache_follows_training():
    X, W, A, B, m, bias = leaves()
    cache, optimizer = NormCache(), torch.optim.AdamW([A, B, m, bias], lr=0.05)
    for _ in range(3):
        kept = dora_linear(X, W, A, B, m, bias, scaling=1.7, norms=cache)
        assert torch.equal(kept, dora_linear(X, W, A, B, m, bias, scaling=1.7))
        kept.square().mean().backward()
        optimizer.step()


def test_what_does_not_fit_is_refused():
    X, W, A, B, m, bias = leaves()
    with pytest.raises(lk.FrozenWeightError):
        dora_linear(X, W.clone().requires_grad_(), A, B, m, bias)
    with pytest.raises(lk.ShapeError, match=r"m is torch\.float32 \(9,\)"):
        dora_linear(X, W, A, B, m[:9], bias)
    with pytest.raises(lk.ShapeError, match=r"m is torch\.int64"):
        dora_linear(X, W, A, B, m.long(), bias)
    with pytest.raises(lk.ShapeError, match="do not fit"):
        dora_linear(X, W, A.t(), B, m, bias)
    with pytest.raises(lk.ConfigError, match="dropout_p"):
        dora_linear(X, W, A, B, m, bias, dropout_p=1.5)
    with pytest.raises(lk.BackendUnavailableError):
        dora_linear(X.double(), W.double(), A, B, m, bias.double(), backend="triton")
