"""The registered operators of the SwiGLU block: schema, fake tensors and dispatch, by opcheck."""

import pytest
import torch

from lora_kernels.ops import lora_mlp  # noqa: F401  (registers the operators)
from lora_kernels.testing.stacked import make_mlp

BACKENDS = ["reference", "triton:shrink_extend"]


def operands(device, p=0.0, dtype=torch.float32):
    problems = make_mlp(6, 14, 20, 12, (3, 2, 4), dtype, device, adjacent=True, dropout_p=p)
    parts = zip(*((q.W, q.A, q.B, q.bias, q.scaling) for q in problems), strict=True)
    return problems[0].X, *map(list, parts), p, torch.stack((problems[0].seed, problems[0].seed + 1)) if p else None


@pytest.mark.sampled(4)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck_forward(dtype, backend, p, device):
    args = (*operands(device, p, dtype), backend, p > 0)
    torch.library.opcheck(torch.ops.lora_kernels.lora_mlp_fwd.default, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("some", [False, True])
def test_opcheck_backward(backend, some, device):
    X, W, A, B, _, scaling, p, _ = operands(device)
    made = [torch.randn(6, n, device=device) for n in (12, 20, 20, 3, 2, 4)]
    dY, G, U, xg, xu, HA = made
    needs = (
        (False, [False] * 3, [False, False, True], [False] * 3) if some else (True, [True] * 3, [True] * 3, [True] * 3)
    )
    args = (dY, X, G, U, W, A, B, [xg, xu], HA, scaling, p, None, None, None, *needs, backend)
    torch.library.opcheck(torch.ops.lora_kernels.lora_mlp_bwd.default, args)
