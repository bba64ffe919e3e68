"""The operators of mixed batches: schema, fake tensors, autograd registration."""

import pytest
import torch

from lora_kernels import ops  # noqa: F401  (registers the operators)
from lora_kernels.testing.multi import make_multi_problem, mix_ids


@pytest.mark.parametrize("need_xa", [True, False])
def test_opcheck(need_xa):
    p = make_multi_problem(mix_ids("uniform", 9, 3), 8, 12, (4, 2, 1), torch.float32)
    fwd, bwd = (
        torch.ops.lora_kernels.multi_lora_linear_fwd.default,
        torch.ops.lora_kernels.multi_lora_linear_bwd.default,
    )
    torch.library.opcheck(fwd, (p.X, p.W, *p.slots, p.ids, p.bias, need_xa, "reference"))
    _, XA = fwd(p.X, p.W, *p.slots, p.ids, p.bias, True, "reference")
    needs = [True, need_xa, True, True]
    torch.library.opcheck(bwd, (p.dY, p.X, p.W, *p.slots, p.ids, XA, needs, "reference"))
