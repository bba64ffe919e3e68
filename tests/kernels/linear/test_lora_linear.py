"""Forward and backward kernels against fp64 by the error rule, on a GPU or in the strict interpreter."""

import pytest
import torch

from lora_kernels import ops
from lora_kernels.kernels.tiles import rank_block
from lora_kernels.reference import GradMask, pack_keep, packed_width, philox_keep_mask, unpack_keep
from lora_kernels.testing import MAGNITUDES, REGIMES, assert_close, fuzz_problems, make_problem, plain, poison, truth
from lora_kernels.testing.rule import Pool

PLANS = ("eager", "shrink_extend", "one_pass")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALL = GradMask(True, True, True, True)


def run(problem, plan, needs=None, keep_bits=True):
    """Y, XA and the four gradients by one plan, in memory that holds NaN until it is written."""
    backend = f"triton:{plan}"
    seed = problem.seed if problem.p else None
    needs = needs or GradMask(True, True, True, problem.bias is not None)
    X, W, A, B = problem.X, problem.W, problem.A, problem.B
    with poison():
        Y, XA, keep = ops.lora_linear_fwd(
            X, W, A, B, problem.bias, problem.scaling, problem.p, seed, backend, keep_bits
        )
        grads = ops.lora_linear_bwd(problem.dY, X, W, A, B, XA, problem.scaling, problem.p, seed, keep, needs, backend)
    return Y, XA, grads


def gaps_are_safe(plan, device):
    """oneDNN's 16-bit product on a CPU reads the gap behind a padded row (F.linear itself gives NaN there)."""
    return plan != "eager" or device != "cpu"


def check(problem, plan, close=assert_close, keep_bits=True):
    M, _, K, _ = problem.shape
    keep = philox_keep_mask(problem.seed, problem.p, M, K) if problem.p else None
    Y, _, (dX, dA, dB, dbias) = run(problem, plan, keep_bits=keep_bits)
    expected, true = plain(problem, keep), truth(problem, keep)
    for name, got in (("Y", Y), ("dX", dX), ("dA", dA), ("dB", dB), ("dbias", dbias)):
        if got is not None:
            close(got, getattr(expected, name), getattr(true, name), what=name, dtype=problem.X.dtype)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.name)
def test_regimes(regime, dtype, plan, device):
    if plan == "one_pass" and regime.r > rank_block(dtype):
        plan = "shrink_extend"  # one_pass holds all ranks in one tile; tests/planning/test_choose.py has its refusal
    for p in (0.0, 0.25):
        M, N, K, r = regime.M, regime.N, regime.K, regime.r
        strided = regime.strided and gaps_are_safe(plan, device)
        check(make_problem(M, N, K, r, dtype, device, dropout_p=p, strided=strided), plan)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("plan", ["eager", "shrink_extend"])
@pytest.mark.parametrize("r", [65, 130])
def test_ranks_above_one_tile(r, plan, device):
    check(make_problem(33, 70, 150, r, torch.bfloat16, device, dropout_p=0.25), plan)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_adapters_over_a_16_bit_base(dtype, plan, device):
    problem = make_problem(40, 48, 64, 8, dtype, device, adapter_dtype=torch.float32)
    _, _, (_, dA, dB, _) = run(problem, plan)
    assert dA.dtype == dB.dtype == torch.float32
    check(problem, plan)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", MAGNITUDES, ids=lambda sizes: sizes.name)
def test_sizes_beyond_16_bit_intermediates(sizes, dtype, plan, device):
    for p in (0.0, 0.25):
        q = make_problem(70, 72, 80, 16, dtype, device, adapter_dtype=torch.float32, magnitudes=sizes, dropout_p=p)
        check(q, plan)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("sizes", [m for m in MAGNITUDES if not m.wide], ids=lambda sizes: sizes.name)
def test_float16_adapters_of_such_sizes(sizes, plan, device):
    check(make_problem(70, 72, 80, 16, torch.float16, device, magnitudes=sizes), plan)


@pytest.mark.parametrize("plan", ["eager", "shrink_extend"])
def test_makes_only_what_is_needed(plan, device):
    problem = make_problem(20, 24, 40, 4, torch.bfloat16, device, dropout_p=0.25)
    _, _, everything = run(problem, plan, ALL)
    for i in range(4):
        needs = GradMask(*(j == i for j in range(4)))
        _, _, grads = run(problem, plan, needs)
        assert [grad is not None for grad in grads] == list(needs)
        assert grads[i].shape == everything[i].shape
        if i:  # dA alone is a pass of its own: another order of summation
            torch.testing.assert_close(grads[i].float(), everything[i].float(), rtol=2e-2, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_same_bits_in_any_order_of_programs(plan, device):
    problem = make_problem(150, 140, 96, 8, torch.bfloat16, device, dropout_p=0.25)
    Y, XA, grads = run(problem, plan)
    for seed in (1, 2):
        if device == "cpu":
            from lora_kernels.testing import interpreter

            interpreter.order(seed)
        again = run(problem, plan)
        for first, second in zip((Y, XA, *grads), (again[0], again[1], *again[2]), strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("keep_bits", [True, False], ids=["bits", "seed"])
@pytest.mark.parametrize("plan", PLANS)
def test_mask_is_the_reference_mask_bit_for_bit(plan, keep_bits, device):
    """W = 0 and A = B = identity make Y the dropped input itself, and dX the mask of the gradient."""
    n, p = 16, 0.5
    problem = make_problem(70, n, n, n, torch.float32, device, bias=False)
    X = torch.ones(70, n, device=device)
    eye, zero = torch.eye(n, device=device), torch.zeros(n, n, device=device)
    seed = torch.tensor([2**63 - 3, -(2**62) + 5], device=device)
    keep = philox_keep_mask(seed, p, 70, n)
    with poison():
        Y, XA, bits = ops.lora_linear_fwd(X, zero, eye, eye, None, 1.0, p, seed, f"triton:{plan}", keep_bits)
        dX, *_ = ops.lora_linear_bwd(X, X, zero, eye, eye, XA, 1.0, p, seed, bits, ALL, f"triton:{plan}")
    assert torch.equal(Y != 0, keep)
    assert torch.equal(dX != 0, keep)
    assert problem.p == 0.0
    assert (bits is not None) == keep_bits


@pytest.mark.sampled(4)
@pytest.mark.parametrize("p", [0.25, 1.0])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("M", "K", "r"), [(70, 129, 5), (33, 8, 16), (65, 200, 40)])
def test_the_bits_that_are_kept_are_the_mask_packed(M, K, r, plan, p, device):
    problem = make_problem(M, 24, K, r, torch.bfloat16, device, dropout_p=p)
    operands = (problem.X, problem.W, problem.A, problem.B, None, 1.0, p, problem.seed, f"triton:{plan}", True)
    _, _, bits = ops.lora_linear_fwd(*operands)
    keep = philox_keep_mask(problem.seed, p, M, K)
    assert torch.equal(bits[:, : K // 8], pack_keep(keep)[:, : K // 8])
    assert torch.equal(unpack_keep(bits, K), keep)
    assert bits.stride() == (packed_width(K), 1)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("plan", PLANS)
def test_bits_and_a_second_draw_give_the_same_bits(plan, device):
    problem = make_problem(70, 90, 130, 20, torch.bfloat16, device, dropout_p=0.25)
    for kept, drawn in zip(run(problem, plan)[2], run(problem, plan, keep_bits=False)[2], strict=True):
        assert torch.equal(kept, drawn)


@pytest.mark.parametrize("plan", ["shrink_extend", "one_pass"])
def test_strides_beyond_2_31_elements(plan, device):
    """Rows 2**30 elements apart in memory that is reserved, not touched: a 32-bit offset would wrap and trap."""

    def far(t):
        flat = torch.empty((t.shape[0] - 1) * 2**30 + t.shape[1], dtype=t.dtype, device=device)
        view = flat.as_strided(t.shape, (2**30, 1))
        view.copy_(t)
        return view

    small = make_problem(4, 4, 40, 3, torch.bfloat16, device, dropout_p=0.25)
    X, dY, W = far(small.X), far(small.dY), far(small.W)
    backend, seed = f"triton:{plan}", small.seed
    Y, XA, _ = ops.lora_linear_fwd(X, W, small.A, small.B, small.bias, 2.0, 0.25, seed, backend)
    near, near_XA, _ = ops.lora_linear_fwd(small.X, small.W, small.A, small.B, small.bias, 2.0, 0.25, seed, backend)
    assert torch.equal(Y, near)
    grads = ops.lora_linear_bwd(dY, X, W, small.A, small.B, XA, 2.0, 0.25, seed, None, ALL, backend)
    near_grads = ops.lora_linear_bwd(
        small.dY, small.X, small.W, small.A, small.B, near_XA, 2.0, 0.25, seed, None, ALL, backend
    )
    for got, expected in zip(grads, near_grads, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("shard", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 20))])
def test_fuzz(shard, device):
    """2,000 shapes in all, small results judged together (a lone element's rounding is luck)."""
    pool = Pool()
    for i, case in enumerate(fuzz_problems(100, seed=shard)):
        plan = PLANS[i % 3] if case.r <= rank_block(case.dtype) else PLANS[i % 2]
        problem = make_problem(
            case.M, case.N, case.K, case.r, case.dtype, device,
            bias=case.bias, dropout_p=case.p, strided=case.strided and gaps_are_safe(plan, device), seed=i,
        )  # fmt: skip
        check(problem, plan, pool.assert_close, keep_bits=i % 2 == 0)
    pool.close()
