"""The registered DoRA operators: schema, fake tensors, and Triton's composition against the reference."""

import pytest
import torch

from lora_kernels.ops import dora_linear as ops
from lora_kernels.ops.weight_norm import weight_norm
from lora_kernels.reference import dora_linear as reference
from lora_kernels.reference import philox_keep_mask
from lora_kernels.reference.dora_linear import DoRANeeds
from lora_kernels.testing import MAGNITUDES, make_problem

BACKENDS = ["reference", "triton:shrink_extend"]


def operands(device, p=0.0, dtype=torch.float32):
    q = make_problem(6, 10, 14, 3, dtype, device, dropout_p=p)
    norm = weight_norm(q.W, q.A, q.B, 1.7)
    m = norm * torch.linspace(0.5, 2, 10, device=device)
    return (q.X, q.W, q.A, q.B, m, norm, q.bias, 1.7, p, q.seed if p else None), q.dY


@pytest.mark.sampled(4)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("keep_z", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck_forward(dtype, backend, p, keep_z, device):
    args, _ = operands(device, p, dtype)
    torch.library.opcheck(torch.ops.lora_kernels.dora_linear_fwd.default, (*args, backend, keep_z))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("needs", [DoRANeeds(bias=True), DoRANeeds(False, True, False, False)], ids=str)
def test_opcheck_backward(backend, p, needs, device):
    (X, W, A, B, m, norm, bias, scaling, p, seed), dY = operands(device, p)
    _, XA, Z, keep = ops.dora_linear_fwd(X, W, A, B, m, norm, bias, scaling, p, seed, backend)
    args = dY, X, W, A, B, m, norm, XA, Z, scaling, p, seed, keep, list(needs), backend
    torch.library.opcheck(torch.ops.lora_kernels.dora_linear_bwd.default, args)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_triton_carries_the_product_and_agrees_with_the_reference(p, adapter, device):
    q = make_problem(37, 53, 71, 8, torch.float32, device, dropout_p=p, adapter_dtype=adapter)
    norm = weight_norm(q.W, q.A, q.B, q.scaling)
    m = norm * torch.linspace(0.5, 2, 53, device=device)
    seed = q.seed if p else None
    keep = philox_keep_mask(q.seed, p, 37, 71) if p else None
    needs = DoRANeeds(bias=True)
    Y, XA, Z, bits = ops.dora_linear_fwd(q.X, q.W, q.A, q.B, m, norm, q.bias, q.scaling, p, seed, BACKENDS[1])
    got = ops.dora_linear_bwd(q.dY, q.X, q.W, q.A, q.B, m, norm, XA, Z, q.scaling, p, seed, bits, needs, BACKENDS[1])
    want_y, want_xa, want_z = reference.dora_linear_fwd(q.X, q.W, q.A, q.B, m, norm, q.bias, q.scaling, keep, p)
    want = reference.dora_linear_bwd(q.dY, q.X, q.W, q.A, q.B, m, norm, want_xa, want_z, q.scaling, keep, p, needs)
    for mine, its in zip((Y, *got), (want_y, *want), strict=True):
        tolerance = 1e-4 if mine.dtype == torch.float32 else 2**-7  # the last bit of a bfloat16
        torch.testing.assert_close(mine, its, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("sizes", MAGNITUDES[::2], ids=lambda sizes: sizes.name)
def test_float16_beyond_its_own_range(sizes, p, device):
    """Against the float32 answer, which float16 intermediates would miss by far more than a float16's last bit."""
    q = make_problem(37, 53, 71, 8, torch.float16, device, dropout_p=p, adapter_dtype=torch.float32, magnitudes=sizes)
    norm = weight_norm(q.W, q.A, q.B, q.scaling)
    m = norm * torch.linspace(0.5, 2, 53, device=device)
    keep = philox_keep_mask(q.seed, p, 37, 71) if p else None
    args, rest = (q.A, q.B, m, norm), (q.scaling, p, q.seed if p else None)
    Y, XA, Z, bits = ops.dora_linear_fwd(q.X, q.W, *args, q.bias, *rest, BACKENDS[1])
    got = ops.dora_linear_bwd(q.dY, q.X, q.W, *args, XA, Z, *rest, bits, DoRANeeds(), BACKENDS[1])
    X, W, bias, dY = (t.float() for t in (q.X, q.W, q.bias, q.dY))
    want_y, want_xa, want_z = reference.dora_linear_fwd(X, W, *args, bias, q.scaling, keep, p)
    want = reference.dora_linear_bwd(dY, X, W, *args, want_xa, want_z, q.scaling, keep, p, DoRANeeds())
    for name, mine, its in zip(("Y", "dX", "dA", "dB", "dm"), (Y, *got), (want_y, *want), strict=False):
        unit = 2**-10 if name in ("Y", "dX", "dm") else 1e-5  # dX and a dropped P are products over W, in float16
        finest = 2**-24 * its.numel() ** 0.5 if mine.dtype == torch.float16 else 0.0
        assert (mine.float() - its).norm() < unit * its.norm() + finest, name


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_meta_tensors_give_shapes_without_arithmetic(p):
    shapes = (6, 14), (10, 14), (3, 14), (10, 3), (10,), (10,), (10,)
    args = (torch.empty(s, device="meta") for s in shapes)
    seed = torch.empty(2, dtype=torch.int64, device="meta") if p else None
    Y, XA, Z, keep = torch.ops.lora_kernels.dora_linear_fwd(*args, 1.0, p, seed, "reference", True)
    assert (Y.shape, XA.shape, Z.shape, keep.shape) == ((6, 10), (6, 3), (6, 10), (0,))
    assert Y.is_meta
