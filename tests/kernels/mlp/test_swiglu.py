"""The SwiGLU kernels against fp64 by the error rule."""

import pytest
import torch

from lora_kernels.kernels.mlp.swiglu import swiglu, swiglu_bwd
from lora_kernels.testing import assert_close, poison


def differentiate(G, U, dH, dtype):
    G, U = (t.detach().to(dtype, copy=True).requires_grad_() for t in (G, U))
    H = torch.nn.functional.silu(G) * U
    return H.detach(), *torch.autograd.grad(H, (G, U), dH.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 1500), (5, 1), (2, 1024)], ids=str)
def test_by_the_error_rule(shape, dtype, device):
    M, F = shape
    torch.manual_seed(0)
    both = (3 * torch.randn(M, 2 * F, device=device)).to(dtype)
    dH = torch.randn(M, F, device=device).to(dtype)
    for G, U in (
        both.split(F, 1),
        (both[:, :F].contiguous(), both[:, F:].contiguous()),
    ):  # parts of one product, or not
        with poison():
            got = swiglu(G, U), *swiglu_bwd(dH.clone(), G, U, make_h=True)
        expected, true = differentiate(G, U, dH, dtype), differentiate(G, U, dH, torch.float64)
        for name, i, j in (("H", 0, 0), ("dG", 1, 1), ("dU", 2, 2), ("H again", 3, 0)):
            assert_close(got[i], expected[j], true[j], what=name, dtype=dtype)
        assert torch.equal(got[0], got[3])


@pytest.mark.filterwarnings(
    "ignore:overflow encountered in exp"
)  # numpy's, in the interpreter: 1 / inf is the 0 wanted
def test_large_values_do_not_become_nan(device):
    G = torch.tensor([[-1e4, -200.0, 0.0, 200.0, 1e4]], device=device)
    dG, dU, H = swiglu_bwd(torch.ones_like(G), G, torch.ones_like(G), make_h=True)
    torch.testing.assert_close(H, torch.tensor([[0.0, 0.0, 0.0, 200.0, 1e4]], device=device))
    torch.testing.assert_close(dG, torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]], device=device))
    torch.testing.assert_close(dU, H)


def test_h_takes_the_place_of_dh_only_where_asked(device):
    G, U, dH = (torch.randn(3, 40, device=device) for _ in range(3))
    kept = dH.clone()
    assert swiglu_bwd(dH, G, U, make_h=False)[2] is None
    assert torch.equal(dH, kept)
    assert swiglu_bwd(dH, G, U, make_h=True)[2] is dH
