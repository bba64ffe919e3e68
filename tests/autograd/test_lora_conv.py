"""lora_conv as a differentiable function: gradients, what is saved, what is refused, PyTorch's transformations."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from lora_kernels.autograd.lora_conv import lora_conv
from lora_kernels.errors import ConfigError, FrozenWeightError, ShapeError


def operands(dtype=torch.float64, M=2, C=4, N=6, r=2, places=(5, 6), kernel=3, groups=1):
    """X, W, A, B, bias, lora_bias; all but W ask for gradients."""
    generator = torch.Generator().manual_seed(0)
    k, ones = (kernel,) * len(places), (1,) * len(places)
    shapes = (M, C, *places), (N, C // groups, *k), (r, C, *k), (N, r // groups, *ones), (N,), (N,)
    X, W, *rest = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return X.requires_grad_(), W, *(t.requires_grad_() for t in rest)


def expected(X, W, A, B, bias, lora_bias, scaling=1.7, **how):
    """PEFT's expression without dropout, in two dimensions."""
    groups = how.pop("groups", 1)
    update = F.conv2d(F.conv2d(X, A, **how), B, lora_bias, groups=groups)
    return F.conv2d(X, W, bias, groups=groups, **how) + update * scaling


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(p, groups):
    X, W, A, B, bias, lora_bias = operands(groups=groups, places=(4, 3))

    def f(X, A, B, bias, lora_bias):
        settings = {"scaling": 1.7, "dropout_p": p, "seed": 11, "padding": 1, "groups": groups}
        return lora_conv(X, W, A, B, bias, lora_bias=lora_bias, **settings)

    assert torch.autograd.gradcheck(f, (X, A, B, bias, lora_bias))


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"stride": 2, "padding": 1},
        {"stride": (2, 1), "padding": (0, 2)},
        {"padding": "same"},
        {"padding": "same", "dilation": 2},
        {"padding": "valid"},
    ],
    ids=str,
)
def test_geometries(how):
    given = operands(places=(7, 6))
    got, true = lora_conv(*given[:5], lora_bias=given[5], scaling=1.7, **how), expected(*given, **how)
    torch.testing.assert_close(got, true)
    leaves = [t for t in given if t.requires_grad]
    dY = torch.randn_like(true)
    for mine, theirs in zip(torch.autograd.grad(got, leaves, dY), torch.autograd.grad(true, leaves, dY), strict=True):
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        assert torch.equal(lora_conv(*given[:5], lora_bias=given[5], scaling=1.7, **how), got)


def saved_bytes(f, given):
    known, kept = {t.untyped_storage().data_ptr() for t in given}, {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        f()
    return sum(kept.values())


@pytest.mark.parametrize(("p", "seed"), [(0.0, 0), (0.1, 16)])
def test_saves_xa_and_a_seed_and_neither_mask_nor_dropped_x(p, seed):
    given = operands(torch.float32, M=3, C=16, N=32, r=4, places=(20, 20))
    how = {"dropout_p": p, "padding": 1}
    assert saved_bytes(lambda: lora_conv(*given[:5], **how), given) == 3 * 4 * 20 * 20 * 4 + seed


def test_the_same_mask_forward_backward_and_after_recomputation():
    X, W, A, B, bias, _ = operands(M=3, C=8, places=(10, 9))

    def block(X):
        return lora_conv(X, W, A, B, bias, dropout_p=0.5, scaling=2.0).square()

    def grads(f):
        torch.manual_seed(5)
        return torch.autograd.grad(f(X).sum(), (X, A, B, bias))

    direct = grads(block)
    again = grads(lambda X: checkpoint(block, X, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(direct, again, strict=True))
    Y = lora_conv(X, W, A, B, bias, dropout_p=0.5, seed=3)  # affine in A for a fixed mask
    (dA,) = torch.autograd.grad(Y.sum(), A)
    zero = lora_conv(X, W, torch.zeros_like(A), B, bias, dropout_p=0.5, seed=3)
    torch.testing.assert_close((Y - zero).sum(), (dA * A).sum())


def test_a_mask_survives_saved_tensors_that_come_back_in_another_layout():
    """As from save_on_cpu, which gives tensors back without their channels-last strides."""
    X, W, A, B, bias, _ = operands(M=3, C=8, places=(10, 9))
    X = X.detach().to(memory_format=torch.channels_last).requires_grad_()

    def grads():
        return torch.autograd.grad(lora_conv(X, W, A, B, bias, dropout_p=0.5, seed=3).square().sum(), (X, A, B))

    direct = grads()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
        moved = grads()
    for mine, theirs in zip(direct, moved, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_dropout_in_training_only_and_by_seed():
    X, W, A, B, bias, _ = operands(M=3, C=8, places=(10, 9))

    def y(**how):
        return lora_conv(X, W, A, B, bias, dropout_p=0.5, **how)

    assert torch.equal(y(training=False), lora_conv(X, W, A, B, bias))
    assert torch.equal(y(seed=3), y(seed=3))
    assert not torch.equal(y(seed=3), y(seed=4))
    torch.manual_seed(1)
    first = y()
    assert not torch.equal(first, y())
    torch.manual_seed(1)
    assert torch.equal(first, y())


def test_autocast_runs_in_its_dtype():
    given = operands(torch.float32, C=16, r=4)
    with torch.autocast("cpu", torch.bfloat16):
        got = lora_conv(*given[:5])
    assert got.dtype == torch.bfloat16
    got.sum().backward()
    assert [t.grad.dtype for t in (given[0], *given[2:5])] == [torch.float32] * 4
    X, W, A, B, bias, _ = (t.detach().bfloat16() for t in given)
    torch.testing.assert_close(got, lora_conv(X, W, A, B, bias))


@pytest.mark.slow
def test_compiles_whole_for_any_batch_and_any_scaling():
    torch._dynamo.reset()
    _, W, A, B, bias, lora_bias = operands(torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    leaves = A, B, bias, lora_bias

    def f(X, scaling):
        return lora_conv(X, W, A, B, bias, lora_bias=lora_bias, scaling=scaling, padding=1)

    compiled = torch.compile(f, fullgraph=True, backend=counter, dynamic=True)
    for M, scaling in ((7, 1.5), (11, 2.5), (13, 0.7)):  # equal to no other size: those are taken for one
        X = torch.randn(M, 4, 5, 6)
        Y, true = compiled(X, scaling), expected(X, W, A, B, bias, lora_bias, scaling, padding=1)
        torch.testing.assert_close(Y, true)
        got, theirs = (torch.autograd.grad(y.square().sum(), leaves) for y in (Y, true))
        for mine, other in zip(got, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-3)
    assert counter.frame_count <= 2


def test_compiled_dropout_uses_one_mask_forward_and_backward():
    """Of a mask that is not known: Y - base is linear in B, and in A, so that each gradient gives it back."""
    torch._dynamo.reset()
    X, W, A, B, bias, _ = operands()
    compiled = torch.compile(lambda X: lora_conv(X, W, A, B, bias, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    Y = compiled(X)
    update = (Y - F.conv2d(X, W, bias)).sum()
    dA, dB = torch.autograd.grad(Y.sum(), (A, B))
    torch.testing.assert_close((dA * A).sum(), update)
    torch.testing.assert_close((dB * B).sum(), update)
    assert not torch.equal(compiled(X), Y)


def test_refusals():
    X, W, A, B, bias, _ = operands()
    with pytest.raises(FrozenWeightError, match=r"W.detach\(\)"):
        lora_conv(X, W.requires_grad_(), A, B, bias)
    W = W.detach()
    bad = (
        (X[0], W, A, B, bias),
        (X, W, A[:, 1:], B, bias),
        (X, W, A, B[1:], bias),
        (X, W, A, B, bias[1:]),
        (X.float(), W, A, B, bias),
        (X, W, A.long(), B, bias),
    )
    for given in bad:
        with pytest.raises(ShapeError, match=r"expected|must share"):
            lora_conv(*given)
    with pytest.raises(ShapeError, match="with 4 groups"):
        lora_conv(X, W, A, B, groups=4)
    for how, match in (
        ({"dropout_p": 1.5}, "probability"),
        ({"stride": (1, 2, 3)}, "each of 2 dimensions"),
        ({"padding": "reflect"}, "padding='reflect'"),
        ({"padding": "same", "stride": 2}, "padding='same'"),
    ):
        with pytest.raises(ConfigError, match=match):
            lora_conv(X, W, A, B, **how)
    with pytest.raises(ConfigError, match="padding='same'"):
        lora_conv(X, W[..., :2, :2], A[..., :2, :2], B, padding="same")


def test_writes_into_nothing_it_was_given_or_saved():
    X, W, A, B, bias, _ = operands()
    leaves, dY = (X, A, B, bias), torch.ones(2, 6, 3, 4, dtype=X.dtype)
    before = [t.detach().clone() for t in (*leaves, W, dY)]
    Y = lora_conv(X, W, A, B, bias, scaling=3.0, dropout_p=0.5)
    first, second = (torch.autograd.grad(Y, leaves, dY, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (*leaves, W, dY), strict=True))
