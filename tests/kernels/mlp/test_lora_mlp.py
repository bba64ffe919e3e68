"""The whole block by its kernels against fp64 by the error rule, on a GPU or in the strict interpreter."""

import pytest
import torch

from lora_kernels.ops import lora_mlp as ops
from lora_kernels.reference import philox_keep_mask
from lora_kernels.reference.lora_mlp import MLPNeeds
from lora_kernels.testing import MAGNITUDES, assert_close, poison
from lora_kernels.testing.stacked import make_mlp, plain_mlp, truth_mlp

ALL = MLPNeeds(True, [True] * 3, [True] * 3, [True, False, True])


def run(problems, plan, needs=ALL, keep_bits=False):
    """Results by one plan, in memory that holds NaN until it is written."""
    W, A, B, bias, scaling = zip(*((q.W, q.A, q.B, q.bias, q.scaling) for q in problems), strict=True)
    X, p, backend = problems[0].X, problems[0].p, f"triton:{plan}"
    seeds = torch.stack((problems[0].seed, problems[0].seed + 1)) if p else None
    ranks = [a.shape[0] for a in A[:2]]
    with poison():
        Y, kept = ops.lora_mlp_fwd(X, W, A, B, bias, scaling, p, seeds, backend, keep_bits)
        args = X, kept.G, kept.U, W, A, B, kept.XA.split(ranks, 1), kept.HA, scaling, p, seeds, kept.keep_x, kept.keep_h
        grads = ops.lora_mlp_bwd(problems[2].dY, *args, needs, backend)
    dA = [None, None] if grads.A is None else grads.A.split(ranks)
    got = {"Y": Y, "dX": grads.X}
    for i, (da, db, dbias) in enumerate(zip((*dA, grads.A_down), grads.B, grads.bias, strict=True)):
        got |= {f"dA{i}": da, f"dB{i}": db, f"dbias{i}": dbias}
    return {name: value for name, value in got.items() if value is not None}


def check(problems, plan, **how):
    (M, K), F, q = problems[0].X.shape, problems[2].X.shape[1], problems[0]
    keep = philox_keep_mask(q.seed, q.p, M, K) if q.p else None
    keep_h = philox_keep_mask(q.seed + 1, q.p, M, F) if q.p else None
    got = run(problems, plan, **how)
    expected, true = plain_mlp(problems, keep, keep_h), truth_mlp(problems, keep, keep_h)
    assert got.keys() == true.keys()
    for name in true:
        assert_close(got[name], expected[name], true[name], what=name, dtype=q.X.dtype)


CASES = {
    "odd": (torch.bfloat16, 37, 40, 71, 53, (8, 3, 5), {}),
    "odd fp32": (torch.float32, 33, 40, 71, 33, (8, 3, 5), {}),
    "adjacent": (torch.float16, 24, 48, 72, 48, (8, 8, 8), {"adjacent": True}),
    "float32 adapters": (torch.bfloat16, 24, 48, 72, 48, (8, 8, 8), {"adapter_dtype": torch.float32}),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("plan", ["eager", "shrink_extend"])
@pytest.mark.parametrize("case", CASES)
def test_cases(case, plan, device):
    dtype, M, K, F, N, ranks, how = CASES[case]
    check(make_mlp(M, K, F, N, ranks, dtype, device, **how), plan)
    check(make_mlp(M, K, F, N, ranks, dtype, device, dropout_p=0.25, **how), plan, keep_bits=True)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("plan", ["eager", "shrink_extend"])
@pytest.mark.parametrize("sizes", MAGNITUDES[::2], ids=lambda sizes: sizes.name)
def test_sizes_beyond_float16_intermediates(sizes, plan, device):
    how = {"adapter_dtype": torch.float32, "magnitudes": sizes}
    check(make_mlp(24, 48, 72, 48, (8, 8, 8), torch.float16, device, **how), plan)


def test_a_mask_drawn_again_is_the_one_kept(device):
    problems = make_mlp(20, 24, 40, 24, (8, 8, 4), torch.float32, device, dropout_p=0.25)
    drawn, kept = run(problems, "shrink_extend"), run(problems, "shrink_extend", keep_bits=True)
    for name in drawn:
        torch.testing.assert_close(drawn[name], kept[name], rtol=1e-4, atol=1e-4, msg=name)


def test_same_bits_in_any_order_of_programs(device):
    problems = make_mlp(140, 24, 72, 24, (8, 8, 4), torch.bfloat16, device, dropout_p=0.25)
    first = run(problems, "shrink_extend", keep_bits=True)
    if device == "cpu":
        from lora_kernels.testing import interpreter

        interpreter.order(1)
    for name, again in run(problems, "shrink_extend", keep_bits=True).items():
        assert torch.equal(first[name], again), name


@pytest.mark.parametrize("plan", ["eager", "shrink_extend"])
def test_makes_only_what_is_needed(plan, device):
    problems = make_mlp(20, 24, 40, 24, (4, 4, 2), torch.float32, device, dropout_p=0.25)
    everything = run(problems, plan)
    none = [False] * 3
    for names, needs in {
        ("dX",): MLPNeeds(True, none, none, none),
        ("dA2",): MLPNeeds(False, [False, False, True], none, none),
        ("dB2", "dbias2"): MLPNeeds(False, none, [False, False, True], [False, False, True]),
        ("dA0", "dA1"): MLPNeeds(False, [True, True, False], none, none),
        ("dB1",): MLPNeeds(False, none, [False, True, False], none),
    }.items():
        got = run(problems, plan, needs)
        assert {name for name in got if name != "Y"} == set(names)
        for name in names:
            torch.testing.assert_close(got[name], everything[name], rtol=1e-4, atol=1e-4)
