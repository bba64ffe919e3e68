"""The registered stacked operators: schema with lists of tensors, fake tensors and dispatch, by opcheck."""

import pytest
import torch

from lora_kernels.ops import lora_linear_stacked  # noqa: F401  (registers the operators)
from lora_kernels.testing.stacked import make_stacked

BACKENDS = ["reference", "triton:eager", "triton:shrink_extend"]


def operands(device, p=0.0, dtype=torch.float32):
    problems = make_stacked(6, 14, (10, 7), (3, 2), dtype, device, adjacent=True, dropout_p=p)
    parts = zip(*((q.W, q.A, q.B, q.bias, q.scaling) for q in problems), strict=True)
    return problems[0].X, *map(list, parts), p, problems[0].seed if p else None


@pytest.mark.sampled(4)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck_forward(dtype, backend, p, device):
    args = (*operands(device, p, dtype), backend, p > 0)
    torch.library.opcheck(torch.ops.lora_kernels.lora_linear_stacked_fwd.default, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", [(True, True, [True] * 2, [True, False]), (False, False, [False, True], [False] * 2)])
def test_opcheck_backward(backend, needs, device):
    X, W, A, B, _, scaling, p, _ = operands(device)
    dY = [torch.randn(6, b.shape[0], device=device) for b in B]
    XA = [torch.randn(6, a.shape[0], device=device) for a in A]
    args = (dY, X, W, A, B, XA, scaling, p, None, None, *needs, backend)
    torch.library.opcheck(torch.ops.lora_kernels.lora_linear_stacked_bwd.default, args)


def test_meta_tensors_give_shapes_without_arithmetic():
    X, W, A, B = (torch.empty(s, device="meta") for s in ((6, 14), (10, 14), (3, 14), (10, 3)))
    fwd = torch.ops.lora_kernels.lora_linear_stacked_fwd
    Y, XA, keep = fwd(X, [W, W], [A, A], [B, B], [None, None], [1.0, 2.0], 0.0, None, "auto", False)
    assert ([y.shape for y in Y], XA.shape, keep.numel()) == ([(6, 10), (6, 10)], (6, 6), 0)
