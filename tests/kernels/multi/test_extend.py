"""multi_extend and multi_expand_add_ against fp64 by the error rule, on a GPU or in the strict interpreter."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear

from lora_kernels.kernels.multi.extend import multi_expand_add_, multi_extend
from lora_kernels.kernels.tiles import GemmConfig
from lora_kernels.operands.dtypes import low_rank_dtype
from lora_kernels.testing import Pool, assert_close, poison
from lora_kernels.testing.multi import fuzz_mixes, make_multi_problem, mix_ids, multi_plain, multi_truth, problem_of
from lora_kernels.testing.multi_cases import REGIMES, far_apart, misplaced, multi_shrunk

SMALL = GemmConfig(16, 32, 64, num_warps=4, num_stages=2, GROUP_M=2)
LARGE = GemmConfig(64, 64, 64, num_warps=4, num_stages=2)


def low(P, Q, p, slots=None):
    """XA or dYB as an exact shrink pass leaves it, beyond doubt in the rows and ranks that nobody may read."""
    slots = slots or p.slots
    return multi_shrunk(P, Q, slots, p.ids, torch.float64).to(low_rank_dtype(P.dtype))


def run(p, config=SMALL, slots=None, XA=None):
    """Y and dX by both kernels, in memory that holds NaN until it is written."""
    slots = slots or p.slots
    A, B = slots.A, slots.B
    XA, dYB = low(p.X, A, p) if XA is None else XA, low(p.dY, B.t(), p)
    with poison():
        Y = multi_extend(p.X, p.W, XA, B, slots, p.ids, p.bias, config)
        dX = multi_extend(p.dY, p.W.t(), dYB, A.t(), slots, p.ids, None, config)
        base, dbase = linear(*(T.contiguous() for T in (p.X, p.W)), p.bias), p.dY.contiguous() @ p.W.contiguous()
        patched = multi_expand_add_(base, XA, B, slots, p.ids, config)
        dpatched = multi_expand_add_(dbase, dYB, A.t(), slots, p.ids, config)
    assert patched is base
    return {"Y": (Y, patched), "dX": (dX, dpatched)}


def check(p, close=assert_close, config=SMALL, slots=None):
    """By other ``slots`` where they are given, that are to mean the problem's own."""
    plain, truth = multi_plain(p), multi_truth(p)
    for name, results in run(p, config, slots).items():
        for kernel, got in zip(("multi_extend", "multi_expand"), results, strict=True):
            close(got, getattr(plain, name), getattr(truth, name), what=f"{name} of {kernel}")


@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.name)
def test_regimes(regime, device):
    check(regime.problem(device), config=SMALL if regime.dtype == torch.float32 else LARGE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_tiles(dtype, device):
    p = make_multi_problem(mix_ids("uniform", 35, 4, run=3, device=device), 33, 65, (8, 17, 0, 3), dtype)
    check(p, config=SMALL)


def test_ids_that_name_no_slot_and_slots_that_point_outside(device):
    p = make_multi_problem(mix_ids("distinct", 40, 8, device=device), 24, 40, (5, 16, 3), torch.float32)
    given, meant = misplaced(p)
    check(replace(p, slots=meant), slots=given)
    wild = torch.tensor([0, -2, 3, 2**31 - 1, -(2**31), 1, 8, -1, 2] * 5, dtype=torch.int32, device=device)[:40]
    check(replace(p, ids=wild))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e4])
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, which interprets
def test_what_is_not_finite_in_one_adapter_stays_with_its_rows(value, device):
    p = make_multi_problem(mix_ids("uniform", 33, 3, device=device), 24, 40, (8, 4, 20), torch.float16)
    sound, mine = run(p), p.ids == 1
    XA = low(p.X, p.slots.A, p)
    XA[mine] = value
    p.slots.B[:, 8:12] = value
    for before, after in zip(sound["Y"], run(p, XA=XA)["Y"], strict=True):
        assert not after[mine].isfinite().any()
        assert torch.equal(after[~mine], before[~mine])


def test_rows_and_columns_beyond_2_31_elements(device):
    """Rows 2**30 elements apart in memory that is reserved, not touched: a 32-bit offset would wrap and trap."""
    p = make_multi_problem(mix_ids("distinct", 4, 2, device=device), 4, 4, (3, 2), torch.bfloat16)
    XA, near = low(p.X, p.slots.A, p), run(p)["Y"]
    for rows in (True, False):
        slots = p.slots._replace(B=far_apart(p.slots.B, rows))
        X, W = far_apart(p.X, rows), far_apart(p.W, rows)
        assert torch.equal(multi_extend(X, W, XA, slots.B, slots, p.ids, p.bias, SMALL), near[0])
        Y = linear(p.X, p.W, p.bias)
        assert torch.equal(multi_expand_add_(far_apart(Y), far_apart(XA), slots.B, slots, p.ids, SMALL), near[1])
    out = far_apart(near[0] * 0)
    assert multi_extend(p.X, p.W, far_apart(XA), p.slots.B, p.slots, p.ids, p.bias, SMALL, out) is out
    assert torch.equal(out, near[0])


def test_expand_touches_rows_with_an_adapter_alone(device):
    p = make_multi_problem(mix_ids("half", 40, 3, run=3, device=device), 24, 40, (8, 4, 20), torch.bfloat16)
    Y = torch.randn_like(p.dY)
    Y[p.ids < 0] = float("nan")
    bits = Y.view(torch.int16).clone()
    multi_expand_add_(Y, low(p.X, p.slots.A, p), p.slots.B, p.slots, p.ids, SMALL)
    assert torch.equal(Y.view(torch.int16)[p.ids < 0], bits[p.ids < 0])
    assert Y[p.ids >= 0].isfinite().all()


def test_ranks_beside_those_of_a_row_are_not_read(device):
    """XA past max_rank lies in another tensor's memory, and what A and B hold between the slots may be anything."""
    p = make_multi_problem(
        mix_ids("uniform", 20, 3, device=device), 24, 40, (8, 4, 20), torch.bfloat16, pool_layout=True, gap=16
    )
    XA = low(p.X, p.slots.A, p)
    wide = XA.new_full((20, 64), float("nan"))
    wide[:, :20] = XA
    assert torch.equal(run(p, XA=wide[:, :20])["Y"][0], run(p)["Y"][0])


def test_same_bits_in_any_order_of_programs(device):
    p = make_multi_problem(mix_ids("skewed", 40, 4, run=2, device=device), 40, 40, (8, 4, 20, 1), torch.float16)
    first = run(p)
    for seed in (1, 2):
        if device == "cpu":
            from lora_kernels.testing import interpreter

            interpreter.order(seed)
        for name, again in run(p).items():
            assert all(torch.equal(a, b) for a, b in zip(first[name], again, strict=True)), name


def test_a_row_does_not_depend_on_its_neighbours(device):
    """The bits of a row are those of a batch that it has to itself."""
    p = make_multi_problem(mix_ids("uniform", 20, 3, device=device), 24, 40, (8, 4, 20), torch.float16)
    Y = run(p)["Y"][0]
    for m in (0, 7, 19):
        alone = replace(p, X=p.X[m : m + 1], dY=p.dY[m : m + 1], ids=p.ids[m : m + 1])
        assert torch.equal(run(alone)["Y"][0][0], Y[m])


@pytest.mark.slow
def test_fuzz(device):
    pool = Pool()
    for number, case in enumerate(fuzz_mixes(150, seed=22)):
        check(problem_of(case), pool.assert_close, SMALL if number % 2 else LARGE)
    pool.close()
