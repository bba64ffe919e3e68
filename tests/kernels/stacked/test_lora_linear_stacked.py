"""The stacked kernels against fp64 by the error rule, on a GPU or in the strict interpreter."""

import pytest
import torch

from lora_kernels.ops import lora_linear_stacked as ops
from lora_kernels.reference import philox_keep_mask
from lora_kernels.reference.lora_linear_stacked import StackedNeeds
from lora_kernels.testing import MAGNITUDES, assert_close, poison
from lora_kernels.testing.stacked import make_stacked, plain_stacked, truth_stacked

PLANS = ("eager", "shrink_extend")


def run(problems, plan, live=None, keep_bits=False):
    """Results by one plan, in memory that holds NaN until it is written."""
    backend = f"triton:{plan}"
    W, A, B, bias, scaling = zip(*((q.W, q.A, q.B, q.bias, q.scaling) for q in problems), strict=True)
    X, p = problems[0].X, problems[0].p
    seed = problems[0].seed if p else None
    live = list(range(len(problems))) if live is None else live

    def of(values):
        return [values[i] for i in live]

    with poison():
        Y, XA, keep = ops.lora_linear_stacked_fwd(X, W, A, B, bias, scaling, p, seed, backend, keep_bits)
        needs = StackedNeeds(True, True, [True] * len(live), of([b is not None for b in bias]))
        args = X, of(W), of(A), of(B), of(XA.split([a.shape[0] for a in A], 1)), of(scaling), p, seed, keep
        dX, dA, dB, dbias = ops.lora_linear_stacked_bwd([problems[i].dY for i in live], *args, needs, backend)
    got = {f"Y{i}": y for i, y in enumerate(Y)} | {"dX": dX}
    for i, da, db, dbias_i in zip(live, dA.split([A[i].shape[0] for i in live]), dB, dbias, strict=True):
        got |= {f"dA{i}": da, f"dB{i}": db} | ({} if dbias_i is None else {f"dbias{i}": dbias_i})
    return got


def check(problems, plan, live=None, keep_bits=False):
    (M, K), q = problems[0].X.shape, problems[0]
    keep = philox_keep_mask(q.seed, q.p, M, K) if q.p else None
    got = run(problems, plan, live, keep_bits)
    expected, true = plain_stacked(problems, keep, live), truth_stacked(problems, keep, live)
    assert got.keys() == true.keys()
    for name in true:
        assert_close(got[name], expected[name], true[name], what=name, dtype=q.X.dtype)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = {
    "qkv": (BF16, 70, 72, (136, 40, 40), (8, 8, 8), {}),
    "qkv fp32": (FP32, 33, 40, (70, 20, 20), (8, 8, 8), {}),
    "gate-up": (BF16, 40, 64, (72, 72), (16, 16), {"adjacent": True}),
    "gate-up fp16": (FP16, 40, 64, (72, 72), (16, 16), {"adjacent": True}),
    "alone": (BF16, 33, 40, (72,), (4,), {}),
    "all their own": (BF16, 37, 71, (53, 7, 131), (17, 1, 8), {"scalings": (1.7, 0.3, 2.9)}),
    "all their own fp32": (FP32, 37, 71, (53, 7, 70), (17, 1, 8), {"scalings": (1.7, 0.3, 2.9)}),
    "more ranks than a tile": (BF16, 33, 70, (40, 40, 24), (40, 24, 16), {"adjacent": True}),
    "strided": (BF16, 37, 71, (53, 20), (8, 3), {"strided": True}),
    "one row": (FP16, 1, 48, (64, 16), (8, 8), {"biases": (False, False)}),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", CASES)
def test_cases(case, plan, device):
    dtype, M, K, Ns, ranks, how = CASES[case]
    if plan == "eager" and device == "cpu" and case == "strided":
        how = {}  # oneDNN's 16-bit product reads the gap behind a padded row
    for p, keep_bits in ((0.0, False), (0.25, True)):
        check(make_stacked(M, K, Ns, ranks, dtype, device, dropout_p=p, **how), plan, keep_bits=keep_bits)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("live", [[1], [0, 2]], ids=str)
def test_projections_without_a_gradient_are_left_out(live, plan, device):
    problems = make_stacked(40, 48, (24, 40, 16), (4, 8, 3), torch.bfloat16, device, dropout_p=0.25)
    check(problems, plan, live)


@pytest.mark.parametrize("plan", PLANS)
def test_float32_adapters_and_a_mask_drawn_again(plan, device):
    problems = make_stacked(
        70, 96, (40, 24), (8, 8), torch.bfloat16, device, adapter_dtype=torch.float32, dropout_p=0.25
    )
    assert run(problems, plan)["dA1"].dtype == torch.float32
    check(problems, plan, keep_bits=False)


@pytest.mark.parametrize("plan", PLANS)
def test_same_bits_in_any_order_of_programs(plan, device):
    problems = make_stacked(140, 40, (72, 24), (8, 8), torch.bfloat16, device, dropout_p=0.25)
    first = run(problems, plan, keep_bits=True)
    for seed in (1, 2):
        if device == "cpu":
            from lora_kernels.testing import interpreter

            interpreter.order(seed)
        for name, again in run(problems, plan, keep_bits=True).items():
            assert torch.equal(first[name], again), name


def test_bits_and_seed_are_one_mask(device):
    problems = make_stacked(33, 136, (40, 24), (8, 8), torch.float32, device, dropout_p=0.25)
    drawn, kept = run(problems, "shrink_extend"), run(problems, "shrink_extend", keep_bits=True)
    for name in drawn:
        torch.testing.assert_close(drawn[name], kept[name], rtol=1e-4, atol=1e-4, msg=name)  # dX's tiles differ


def test_outputs_of_one_product_are_not_views(device):
    problems = make_stacked(9, 16, (8, 4), (2, 2), torch.float32, device, adjacent=True)
    W, A, B, bias, scaling = zip(*((q.W, q.A, q.B, q.bias, q.scaling) for q in problems), strict=True)
    Y, _, _ = ops.lora_linear_stacked_fwd(problems[0].X, W, A, B, bias, scaling, 0.0, None, "triton:eager")
    assert Y[0].untyped_storage().data_ptr() == Y[1].untyped_storage().data_ptr()
    assert not any(y._is_view() for y in Y)
    kept = Y[1].clone()
    Y[0].zero_()
    assert torch.equal(Y[1], kept)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("sizes", MAGNITUDES, ids=lambda sizes: sizes.name)
def test_sizes_beyond_16_bit_intermediates(sizes, dtype, plan, device):
    how = {"adapter_dtype": FP32, "magnitudes": sizes, "adjacent": True}
    check(make_stacked(40, 64, (72, 40), (16, 8), dtype, device, **how), plan)
    check(make_stacked(40, 64, (72, 40), (16, 8), dtype, device, dropout_p=0.25, **how), plan, keep_bits=True)
