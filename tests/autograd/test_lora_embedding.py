"""lora_embedding as a differentiable function: gradients, what is saved, what is refused, PyTorch's transformations."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from lora_kernels.autograd.lora_embedding import lora_embedding
from lora_kernels.errors import FrozenWeightError, ShapeError

VOCAB, N, R = 11, 6, 3


def operands(dtype=torch.float64, vocab=VOCAB, n=N, r=R):
    generator = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(s, generator=generator, dtype=dtype) for s in ((vocab, n), (r, vocab), (n, r)))
    return W, A.requires_grad_(), B.requires_grad_()


IDS = torch.tensor([[1, 4, 4, 10], [0, 4, 2, 2]])


def test_gradcheck_with_two_adapters():
    W, A, B = operands()
    A2, B2 = torch.randn(2, VOCAB, dtype=W.dtype, requires_grad=True), torch.randn(N, 2, dtype=W.dtype)

    def f(A, B, A2):
        return lora_embedding(IDS, W, A, B, scaling=1.7, more=[(A2, B2, 0.3)], base_scale=2.0)

    assert torch.autograd.gradcheck(f, (A, B, A2))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_ids_of_any_shape(shape, dtype):
    W, A, B = operands()
    ids = torch.randint(0, VOCAB, shape, dtype=dtype)
    Y = lora_embedding(ids, W, A, B, scaling=2.0)
    torch.testing.assert_close(Y, W[ids] + 2.0 * A.T[ids] @ B.T)
    Y.sum().backward()
    assert A.grad.shape == A.shape
    with torch.no_grad():
        assert torch.equal(lora_embedding(ids, W, A, B, scaling=2.0), Y)


def test_strided_ids_and_gradients():
    W, A, B = operands()
    ids = IDS.t()
    dY = torch.randn(N, 4, 2, dtype=W.dtype).permute(1, 2, 0)
    Y = lora_embedding(ids, W, A, B)
    got = torch.autograd.grad(Y, (A, B), dY)
    expected = torch.autograd.grad(W[ids] + A.T[ids] @ B.T, (A, B), dY)
    for mine, true in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("padding_idx", [4, -7])
def test_padding_gets_no_gradient_in_A_but_counts_in_B(padding_idx):
    W, A, B = operands()
    padded = torch.autograd.grad(lora_embedding(IDS, W, A, B, padding_idx=padding_idx).sum(), (A, B))
    free = torch.autograd.grad(lora_embedding(IDS, W, A, B).sum(), (A, B))
    assert padded[0][:, 4].abs().max() == 0
    kept = [v for v in range(VOCAB) if v != 4]
    assert torch.equal(padded[0][:, kept], free[0][:, kept])
    assert free[0][:, 4].abs().max() > 0
    assert torch.equal(padded[1], free[1])


def test_saves_the_ids_and_the_gathered_rows():
    W, A, B = operands(torch.float32, vocab=5000, n=64, r=4)
    ids = torch.randint(0, 5000, (300,))
    given = {t.untyped_storage().data_ptr() for t in (W, A, B, ids)}
    saved = {}

    def pack(t):
        assert t.shape != A.shape
        if t.untyped_storage().data_ptr() not in given:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora_embedding(ids, W, A, B)
    assert sum(saved.values()) == 300 * 4 * 4


def test_the_same_bits_every_time():
    W, A, B = operands(torch.float32, vocab=20)
    ids = torch.randint(0, 20, (4000,))

    def grads():
        return torch.autograd.grad(lora_embedding(ids, W, A, B).square().sum(), (A, B))

    assert all(torch.equal(a, b) for a, b in zip(grads(), grads(), strict=True))


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_one_half_frozen(frozen):
    W, A, B = operands()
    (A if frozen == "A" else B).requires_grad_(False)
    lora_embedding(IDS, W, A, B).sum().backward()
    assert (A.grad is None) == (frozen == "A")
    assert (B.grad is None) == (frozen == "B")


def test_a_scaling_held_in_a_tensor():
    W, A, B = operands()
    got, expected = (lora_embedding(IDS, W, A, B, scaling=s) for s in (torch.tensor(1.25), 1.25))
    torch.testing.assert_close(got, expected)
    for one, other in zip(*(torch.autograd.grad(Y.square().sum(), (A, B)) for Y in (got, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_changes_nothing():
    W, A, B = operands(torch.float32)
    expected = lora_embedding(IDS, W, A, B)
    with torch.autocast("cpu", torch.bfloat16):
        got = lora_embedding(IDS, W, A, B)
        assert torch.equal(got, expected)
        narrow = lora_embedding(IDS, W.bfloat16(), A, B)
    assert torch.equal(narrow, lora_embedding(IDS, W.bfloat16(), A, B))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    W, A, B = operands()

    def block(A):
        return lora_embedding(IDS, W, A, B).square()

    direct = torch.autograd.grad(block(A).sum(), A)[0]
    checkpoint(block, A, use_reentrant=reentrant).sum().backward()
    assert torch.equal(A.grad, direct)


def test_compiles_whole_for_any_number_of_ids_and_any_scaling():
    torch._dynamo.reset()
    W, A, B = operands(torch.float32)
    counter = CompileCounterWithBackend("aot_eager")

    def f(ids, scaling):
        return lora_embedding(ids, W, A, B, scaling=scaling, padding_idx=4)

    compiled = torch.compile(f, fullgraph=True, backend=counter, dynamic=True)
    for n, scaling in ((3, 1.5), (7, 2.5), (9, 0.7), (20, 3.1)):
        ids = torch.randint(0, VOCAB, (2, n))
        Y, expected = compiled(ids, scaling), f(ids, scaling)
        torch.testing.assert_close(Y, expected)
        got, true = (torch.autograd.grad(y.square().sum(), (A, B)) for y in (Y, expected))
        for mine, theirs in zip(got, true, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert counter.frame_count <= 2


def test_refusals():
    W, A, B = operands()
    with pytest.raises(IndexError):
        lora_embedding(torch.tensor([VOCAB]), W, A, B)
    with pytest.raises(IndexError):
        lora_embedding(torch.tensor([-1]), W, A, B)
    with pytest.raises(FrozenWeightError, match=r"W.detach\(\)"):
        lora_embedding(IDS, W.requires_grad_(), A, B)
    W = W.detach()
    for bad in ((IDS.float(), W, A, B), (IDS, W, A[:, 1:], B), (IDS, W, A, B[1:]), (IDS, W, A, B.float())):
        with pytest.raises(ShapeError, match="expected"):
            lora_embedding(*bad)
    with pytest.raises(ShapeError, match="outside a vocabulary of 11"):
        lora_embedding(IDS, W, A, B, padding_idx=VOCAB)


def test_writes_into_nothing_it_was_given_or_saved():
    W, A, B = operands()
    before = [t.detach().clone() for t in (W, A, B, IDS)]
    Y = lora_embedding(IDS, W, A, B, scaling=3.0, base_scale=2.0)
    first, second = (torch.autograd.grad(Y, (A, B), torch.ones_like(Y), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (W, A, B, IDS), strict=True))
