"""DoRA's row norms against float64 and against what PEFT computes, also where W and the update cancel."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels.reference.weight_norm import BLOCK, base_norm_sq, row_blocks, weight_norm, weight_norm_direct
from lora_kernels.testing import assert_close

BOTH = pytest.mark.parametrize("norm", [weight_norm, weight_norm_direct])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def operands(N, K, r, dtype=torch.float32, adapter=torch.float32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    W, A, B = (torch.randn(s, generator=gen) for s in ((N, K), (r, K), (N, r)))
    return (W * K**-0.5).to(dtype), (A * K**-0.5).to(adapter), (B * r**-0.5).to(adapter)


def truth(W, A, B, scaling):
    return torch.linalg.norm(W.double() + scaling * (B.double() @ A.double()), dim=1)


def plain(W, A, B, scaling):
    """PEFT's expression with W and the adapter in float32."""
    return torch.linalg.norm(W.float() + scaling * (B.float() @ A.float()), dim=1)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(300, 200, 8), (37, 53, 1), (1, 64, 4), (64, 1, 2), (20, 30, 33), (2000, 700, 16)])
def test_the_norms_by_the_rule(norm, dtype, shape):
    for adapter in {torch.float32, dtype}:
        W, A, B = operands(*shape, dtype, adapter)
        got = norm(W, A, B, 1.7)
        assert_close(got, plain(W, A, B, 1.7), truth(W, A, B, 1.7))
        transposed = norm(W.t().contiguous().t(), A, B, 1.7)
        assert_close(transposed, plain(W, A, B, 1.7), truth(W, A, B, 1.7))


@BOTH
def test_float64_stays_float64(norm):
    W, A, B = operands(30, 40, 5, torch.float64, torch.float64)
    torch.testing.assert_close(norm(W, A, B, 0.6), truth(W, A, B, 0.6), rtol=1e-14, atol=0)
    assert norm(W.float(), A, B, 0.6).dtype == torch.float64


@pytest.mark.parametrize("distance", [1.0, 0.5, 1e-1, 1e-2, 1e-3, 1e-5, 1e-7])
@BOTH
def test_rows_that_cancel_are_as_exact_as_pefts(norm, distance):
    """W = -(s B A) + distance * noise of the same size, in every second row."""
    noise, A, B = operands(400, 300, 8)
    W = noise.clone()
    W[::2] = (-1.7 * (B.double() @ A.double()) + distance * noise.double())[::2].float()
    args = W, A, B, 1.7
    cancelled = slice(None, None, 2)
    assert_close(norm(*args)[cancelled], plain(*args)[cancelled], truth(*args)[cancelled])
    assert_close(norm(*args), plain(*args), truth(*args))


def test_the_factored_terms_alone_would_be_wrong_there(monkeypatch):
    monkeypatch.setattr("lora_kernels.reference.weight_norm.CANCELLED", -1.0)
    noise, A, B = operands(400, 300, 8)
    W = (-1.7 * (B.double() @ A.double()) + 1e-3 * noise.double()).float()
    with pytest.raises(AssertionError, match="norms"):
        assert_close(weight_norm(W, A, B, 1.7), plain(W, A, B, 1.7), truth(W, A, B, 1.7), what="norms")


@BOTH
def test_rows_of_nothing_have_norm_zero(norm):
    A, B = torch.randint(-3, 4, (4, 50)).float(), torch.randint(-3, 4, (20, 4)).float()
    W = -2.0 * (B @ A)
    assert torch.equal(norm(W, A, B, 2.0), torch.zeros(20))
    assert torch.equal(norm(torch.zeros_like(W), A, torch.zeros_like(B), 2.0), torch.zeros(20))


@BOTH
def test_nan_and_infinity_are_not_hidden(norm):
    W, A, B = operands(6, 10, 2)
    B[1, 0], W[2, 3] = float("nan"), float("inf")
    got = norm(W, A, B, 1.0)
    assert got[1].isnan()
    assert not got[2].isfinite()
    assert got[[0, 3, 4, 5]].isfinite().all()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cancels", [False, True])
def test_nothing_of_the_size_of_w_is_ever_made(norm, dtype, cancels):
    W, A, B = operands(3000, 1000, 8, dtype)
    if cancels:
        W = (-1.7 * (B @ A)).to(dtype)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage()._cdata != W.untyped_storage()._cdata:
                largest = max(largest, out.numel())
            return out

    with Watch():
        norm(W, A, B, 1.7)
    assert 0 < largest <= BLOCK < W.numel()


def test_blocks_cover_every_row_once():
    for N, K, elements in ((10, 3, 9), (7, 100, 9), (0, 5, 9), (12, 3, 36), (3, 0, 5)):
        rows = [row for block in row_blocks(N, K, elements) for row in range(N)[block]]
        assert rows == list(range(N))
        assert all((b.stop - b.start) * K <= max(elements, K) for b in row_blocks(N, K, elements))


def test_known_base_norms_are_used():
    W, A, B = operands(50, 40, 4)
    assert torch.equal(weight_norm(W, A, B, 1.0, base_norm_sq(W)), weight_norm(W, A, B, 1.0))
    assert (weight_norm(W, A, B, 1.0, base_norm_sq(W) + 5) > weight_norm(W, A, B, 1.0)).all()
