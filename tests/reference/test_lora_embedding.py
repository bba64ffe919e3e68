"""The reference embedding against autograd of the plain expression, in fp64 and by the error rule."""

import pytest
import torch
from torch.nn.functional import embedding

from lora_kernels.reference import lora_embedding
from lora_kernels.reference.lora_embedding import lora_embedding_bwd, lora_embedding_fwd
from lora_kernels.testing import assert_close


def problem(M=96, vocab=50, N=72, r=8, base=torch.float64, adapter=torch.float64, seed=0):
    """ids with repetitions, W, A, B, dY; the update is as large as the base."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (M,), generator=generator)
    W, A, B, dY = (torch.randn(*s, generator=generator) for s in ((vocab, N), (r, vocab), (N, r), (M, N)))
    return ids, W.to(base), A.to(adapter), (B * (r**-0.5 / 1.7)).to(adapter), dY.to(base)


def autograd(ids, W, A, B, dY, dtype=None, base_scale=1.0, padding_idx=None):
    """Y, dA, dB of PEFT's expression, in W's and A's dtypes or all in ``dtype``."""
    A, B = (t.to(dtype or t.dtype).detach().requires_grad_() for t in (A, B))
    W, dY = (t.to(dtype or t.dtype) for t in (W, dY))
    Y = embedding(ids, W) * base_scale
    Y = (Y + (embedding(ids, A.T, padding_idx) @ B.T) * 1.7).to(W.dtype)
    Y.backward(dY)
    return Y.detach(), A.grad, B.grad


def run(ids, W, A, B, dY, base_scale=None, padding_idx=None):
    Y, (XA,) = lora_embedding_fwd(ids, W, [(A, B, 1.7)], base_scale)
    return Y, *lora_embedding_bwd(dY, ids, B, XA, 1.7, W.shape[0], padding_idx)


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("base_scale", [None, 2.5])
def test_equals_autograd_in_float64(padding_idx, base_scale):
    given = problem()
    expected = autograd(*given, base_scale=base_scale or 1.0, padding_idx=padding_idx)
    for got, true in zip(run(*given, base_scale, padding_idx), expected, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-12)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("adapter", DTYPES, ids=str)
@pytest.mark.parametrize("base", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [200, 1 << 17], ids=["chunks", "whole"])
def test_error_rule(base, adapter, chunk, monkeypatch):
    monkeypatch.setattr(lora_embedding, "CHUNK", chunk)
    given = problem(base=base, adapter=adapter)
    plain, true = autograd(*given), autograd(*given, dtype=torch.float64)
    for name, got, expected, exact in zip(("Y", "dA", "dB"), run(*given), plain, true, strict=True):
        assert got.dtype == (base if name == "Y" else adapter)
        assert_close(got, expected, exact, what=name)


@pytest.mark.parametrize(
    ("adapter", "b", "dy"),
    [
        (torch.float32, 1e-4, 1.0),
        (torch.float32, 1e-6, 1.0),
        (torch.float32, 4e4, 1e-3),
        (torch.float32, 1.0, 1e-6),
        (torch.float16, 1.0, 1e-6),
        (torch.float16, 1e4, 1e-3),
    ],
    ids=str,
)
def test_sizes_that_float16_products_cannot_hold(adapter, b, dy):
    """Also by autocast's rules, which would narrow the backward's products; scaling B leaves float16's range, too."""
    ids, W, A, B, dY = problem()
    given = ids, *(t.to(d) for t, d in ((W, torch.float16), (A / b, adapter), (B * b, adapter))), (dY * dy).half()
    true = autograd(*given, dtype=torch.float64)
    plain = autograd(*(t if t.dtype == torch.int64 else t.float() for t in given))
    with torch.autocast("cpu", dtype=torch.float16):
        found = run(*given)
    for name, got, expected, exact in zip(("Y", "dA", "dB"), found, plain, true, strict=True):
        assert_close(got, expected.to(got.dtype), exact, what=name, dtype=torch.float16)


def test_several_updates_add_up():
    ids, W, A, B, _ = problem()
    Y, gathered = lora_embedding_fwd(ids, W, [(A, B, 1.7), (A[:3], B[:, :3], 0.5)])
    expected = W[ids] + 1.7 * A.T[ids] @ B.T + 0.5 * A[:3].T[ids] @ B[:, :3].T
    torch.testing.assert_close(Y, expected, rtol=1e-12, atol=1e-12)
    assert [tuple(XA.shape) for XA in gathered] == [(8, 96), (3, 96)]


def test_a_frequent_id_does_not_lose_its_gradient_in_bfloat16():
    """4,096 equal contributions: a bf16 sum stops growing at 256 of them."""
    ids, dY = torch.zeros(4096, dtype=torch.int64), torch.ones(4096, 1, dtype=torch.bfloat16)
    ones = torch.ones(1, 1, dtype=torch.bfloat16)
    dA, _ = lora_embedding_bwd(dY, ids, ones, torch.ones(1, 4096, dtype=torch.bfloat16), 1.0, 2)
    assert dA.tolist() == [[4096.0, 0.0]]


def test_makes_only_what_is_needed_and_in_the_layout_of_the_parameters():
    ids, W, A, B, dY = problem()
    Y, (XA,) = lora_embedding_fwd(ids, W, [(A, B, 1.0)])
    for needs in ((True, False), (False, True)):
        grads = lora_embedding_bwd(dY, ids, B, XA, 1.0, W.shape[0], None, needs)
        assert tuple(grad is not None for grad in grads) == needs
    dA, dB = lora_embedding_bwd(dY, ids, B, XA, 1.0, W.shape[0])
    assert dA.stride() == A.stride()
    assert dB.is_contiguous()
    assert Y.is_contiguous()


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_update_of_a_16_bit_base_is_rounded_once(base):
    given = problem(base=base, adapter=torch.float32)
    true = autograd(*given, dtype=torch.float64)[0].to(base)
    assert (run(*given)[0] == true).double().mean() > 0.98
