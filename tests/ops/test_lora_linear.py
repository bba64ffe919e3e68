"""The registered operators: schema, fake tensors and dispatch, by torch.library.opcheck."""

import pytest
import torch

from lora_kernels import ops  # noqa: F401  (registers the operators)
from lora_kernels.testing import make_problem

BACKENDS = ["reference", "triton:shrink_extend"]


def fwd_args(dtype, device, backend, p=0.0):
    q = make_problem(6, 10, 14, 3, dtype, device)
    return (q.X, q.W, q.A, q.B, q.bias, 1.7, p, q.seed if p else None, backend, True)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck_forward(dtype, backend, p, device):
    args = fwd_args(dtype, device, backend, p)
    torch.library.opcheck(torch.ops.lora_kernels.lora_linear_fwd.default, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", [(True, True, True, True), (False, True, False, False)], ids=str)
def test_opcheck_backward(backend, needs, device):
    X, W, A, B, _, scaling, p, *_ = fwd_args(torch.float32, device, backend)
    dY, XA = torch.randn(6, 10, device=device), torch.randn(6, 3, device=device)
    args = (dY, X, W, A, B, XA, scaling, p, None, None, list(needs), backend)
    torch.library.opcheck(torch.ops.lora_kernels.lora_linear_bwd.default, args)


def test_opcheck_backward_from_bits(device):
    X, W, A, B, bias, scaling, p, seed, backend, _ = fwd_args(torch.float32, device, BACKENDS[1], 0.5)
    _, XA, keep = torch.ops.lora_kernels.lora_linear_fwd(X, W, A, B, bias, scaling, p, seed, backend, True)
    args = (torch.randn(6, 10, device=device), X, W, A, B, XA, scaling, p, seed, keep, [True] * 4, backend)
    torch.library.opcheck(torch.ops.lora_kernels.lora_linear_bwd.default, args)


def test_meta_tensors_give_shapes_without_arithmetic():
    X, W, A, B = (torch.empty(s, device="meta") for s in ((6, 14), (10, 14), (3, 14), (10, 3)))
    Y, XA, keep = torch.ops.lora_kernels.lora_linear_fwd(X, W, A, B, None, 1.0, 0.0, None, "auto", True)
    assert (Y.shape, XA.shape, keep.shape) == ((6, 10), (6, 3), (0,))
    assert Y.is_meta


def test_no_result_depends_on_data_read_by_the_host():
    """Meta tensors have no data, so a read would raise: the path taken on a GPU makes none, dropout included."""

    from lora_kernels import reference

    with torch.device("meta"):
        X, W, A, B = (torch.empty(s, device="meta") for s in ((6, 14), (10, 14), (3, 14), (10, 3)))
        keep = reference.philox_keep_mask(torch.empty(2, dtype=torch.int64, device="meta"), 0.1, 6, 14)
        Y, XA = reference.lora_linear_fwd(X, W, A, B, None, 2.0, keep, 0.1)
        grads = reference.lora_linear_bwd(Y, X, W, A, B, XA, 2.0, keep, 0.1)
    assert all(g.is_meta for g in grads[:3])
