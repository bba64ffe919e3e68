"""The stacked reference against autograd of the plain expression, in fp64, and by the error rule."""

import pytest
import torch

from lora_kernels.reference.lora_linear_stacked import StackedNeeds, lora_linear_stacked_bwd, lora_linear_stacked_fwd
from lora_kernels.testing import assert_close
from lora_kernels.testing.stacked import make_stacked, plain_stacked, truth_stacked


def run(problems, keep, live=None, needs=None):
    W, A, B, bias, scaling = zip(*((q.W, q.A, q.B, q.bias, q.scaling) for q in problems), strict=True)
    X, p = problems[0].X, problems[0].p
    Y, XA = lora_linear_stacked_fwd(X, W, A, B, bias, scaling, keep, p)
    live = list(range(len(problems))) if live is None else live
    blocks = XA.split([a.shape[0] for a in A], 1)

    def of(values):
        return [values[i] for i in live]

    needs = needs or StackedNeeds(True, True, [True] * len(live), of([b is not None for b in bias]))
    args = X, of(W), of(A), of(B), of(blocks), of(scaling), keep, p, needs
    dX, dA, dB, dbias = lora_linear_stacked_bwd([problems[i].dY for i in live], *args)
    got = {f"Y{i}": y for i, y in enumerate(Y)} | ({} if dX is None else {"dX": dX})
    parts = [None] * len(live) if dA is None else dA.split([A[i].shape[0] for i in live])
    for i, da, db, dbias_i in zip(live, parts, dB, dbias, strict=True):
        made = {f"dA{i}": da, f"dB{i}": db, f"dbias{i}": dbias_i}
        got |= {name: grad for name, grad in made.items() if grad is not None}
    return got


@pytest.mark.parametrize("scalings", [(1.7, 1.7, 1.7), (1.7, 0.5, 3.0)], ids=["one scaling", "three"])
@pytest.mark.parametrize(("p", "live"), [(0.0, [0, 1, 2]), (0.3, [0, 1, 2]), (0.3, [0, 2])], ids=str)
def test_equals_autograd_in_float64(p, live, scalings):
    problems = make_stacked(7, 13, (11, 5, 5), (3, 1, 2), torch.float64, dropout_p=p, scalings=scalings)
    keep = torch.rand(7, 13, generator=torch.Generator().manual_seed(1)) >= p if p else None
    got, true = run(problems, keep, live), truth_stacked(problems, keep, live)
    assert got.keys() == true.keys()
    for name in true:
        torch.testing.assert_close(got[name], true[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=["same", "float32"])
def test_error_rule(dtype, adapter_dtype):
    problems = make_stacked(96, 112, (80, 48), (16, 8), dtype, adapter_dtype=adapter_dtype, scalings=(1.7, 0.9))
    got, expected, true = run(problems, None), plain_stacked(problems), truth_stacked(problems)
    for name in true:
        assert_close(got[name], expected[name], true[name], what=name, dtype=dtype)


def test_makes_only_what_is_needed():
    problems = make_stacked(5, 7, (6, 4), (2, 2), torch.float64)
    nothing = StackedNeeds(False, False, [False, False], [False, False])
    for name, needs in {
        "dX": nothing._replace(X=True),
        "dA0": nothing._replace(A=True),  # of all projections at once
        "dB1": nothing._replace(B=[False, True]),
        "dbias0": nothing._replace(bias=[True, False]),
    }.items():
        made = {key for key in run(problems, None, needs=needs) if key.startswith("d")}
        assert made == ({"dA0", "dA1"} if name == "dA0" else {name})
