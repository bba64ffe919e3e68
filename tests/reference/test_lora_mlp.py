"""The reference of the SwiGLU block against autograd of the plain expression, in fp64, and by the error rule."""

import pytest
import torch

from lora_kernels.reference.lora_mlp import MLPNeeds, lora_mlp_bwd, lora_mlp_fwd, swiglu, swiglu_bwd
from lora_kernels.testing import assert_close
from lora_kernels.testing.stacked import make_mlp, plain_mlp, truth_mlp

ALL = MLPNeeds(True, [True] * 3, [True] * 3, [True, False, True])


def run(problems, keep_x=None, keep_h=None, needs=ALL):
    W, A, B, bias, scaling = zip(*((q.W, q.A, q.B, q.bias, q.scaling) for q in problems), strict=True)
    X, p = problems[0].X, problems[0].p
    Y, G, U, XA, HA = lora_mlp_fwd(X, W, A, B, bias, scaling, keep_x, keep_h, p)
    ranks = [a.shape[0] for a in A[:2]]
    args = X, G, U, W, A, B, XA.split(ranks, 1), HA, scaling, keep_x, keep_h, p, needs
    grads = lora_mlp_bwd(problems[2].dY, *args)
    dA = [None, None] if grads.A is None else grads.A.split(ranks)
    got = {"Y": Y, "dX": grads.X}
    for i, (da, db, dbias) in enumerate(zip((*dA, grads.A_down), grads.B, grads.bias, strict=True)):
        got |= {f"dA{i}": da, f"dB{i}": db, f"dbias{i}": dbias}
    return {name: value for name, value in got.items() if value is not None}


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_equals_autograd_in_float64(p):
    problems = make_mlp(7, 9, 13, 11, (3, 2, 4), torch.float64, dropout_p=p)
    generator = torch.Generator().manual_seed(1)
    keep = [torch.rand(7, n, generator=generator) >= p if p else None for n in (9, 13)]
    got, true = run(problems, *keep), truth_mlp(problems, *keep)
    assert got.keys() == true.keys()
    for name in true:
        torch.testing.assert_close(got[name], true[name], rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_rule(dtype):
    problems = make_mlp(64, 72, 96, 80, (8, 4, 8), dtype, adapter_dtype=torch.float32)
    got, expected, true = run(problems), plain_mlp(problems), truth_mlp(problems)
    for name in true:
        assert_close(got[name], expected[name], true[name], what=name, dtype=dtype)


def test_down_alone_needs_nothing_of_gate_and_up():
    problems = make_mlp(7, 9, 13, 11, (3, 2, 4), torch.float64)
    needs = MLPNeeds(False, [False, False, True], [False] * 3, [False, False, True])
    got, true = run(problems, needs=needs), truth_mlp(problems)
    assert set(got) == {"Y", "dA2", "dbias2"}
    torch.testing.assert_close(got["dA2"], true["dA2"])


def test_the_activation_and_its_gradient():
    G, U = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    dH = torch.randn(3, 5, dtype=torch.float64)
    H = G * torch.sigmoid(G) * U
    torch.testing.assert_close(swiglu(G.detach(), U.detach()), H.detach())
    expected = torch.autograd.grad(H, (G, U), dH)
    for got, grad in zip(swiglu_bwd(dH, G.detach(), U.detach()), expected, strict=True):
        torch.testing.assert_close(got, grad)
