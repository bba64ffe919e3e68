"""multi_shrink against fp64 by the error rule, on a GPU or in the strict interpreter."""

from dataclasses import replace

import pytest
import torch

from lora_kernels.kernels.multi.shrink import multi_shrink
from lora_kernels.kernels.tiles import ShrinkConfig
from lora_kernels.operands.dtypes import low_rank_dtype
from lora_kernels.testing import Pool, assert_close, poison
from lora_kernels.testing.multi import fuzz_mixes, make_multi_problem, mix_ids, problem_of
from lora_kernels.testing.multi_cases import REGIMES, far_apart, misplaced, multi_shrunk

SMALL = ShrinkConfig(16, 32, num_warps=4, num_stages=2)
LARGE = ShrinkConfig(64, 64, num_warps=4, num_stages=2)


def run(P, Q, slots, ids, config=SMALL):
    """In memory that holds NaN until it is written."""
    with poison():
        return multi_shrink(P, Q, slots, ids, config)


def check(p, close=assert_close, config=SMALL, slots=None, meant=None):
    """XA and dYB of a problem, by other ``slots`` where they are given, to be what those ``meant`` make."""
    slots, meant = slots or p.slots, meant or p.slots
    for name, P, Q in (("XA", p.X, slots.A), ("dYB", p.dY, slots.B.t())):
        S = run(P, Q, slots, p.ids, config)
        plain, truth = (multi_shrunk(P, Q, meant, p.ids, dtype) for dtype in (low_rank_dtype(P.dtype), torch.float64))
        close(S, plain, truth, what=name)
        assert torch.equal(S == 0, truth == 0), f"{name} is to be zero where a row has no rank"


@pytest.mark.sampled(4)
@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.name)
def test_regimes(regime, device):
    for config in (SMALL, LARGE):
        check(regime.problem(device), config=config)


def test_ids_that_name_no_slot_and_slots_that_point_outside(device):
    p = make_multi_problem(mix_ids("distinct", 40, 8, device=device), 24, 40, (5, 16, 3), torch.float32)
    given, meant = misplaced(p)
    check(p, slots=given, meant=meant)
    wild = torch.tensor([0, -2, 3, 2**31 - 1, -(2**31), 1, 8, -1, 2] * 5, dtype=torch.int32, device=device)[:40]
    check(replace(p, ids=wild))


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(float("inf"), torch.float16), (float("nan"), torch.float16), (3e38, torch.bfloat16)],
    ids=["inf", "nan", "too large"],
)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, which interprets
def test_what_is_not_finite_in_one_adapter_stays_with_its_rows(value, dtype, device):
    p = make_multi_problem(mix_ids("uniform", 33, 3, device=device), 24, 40, (8, 4, 20), dtype)
    sound = run(p.X, p.slots.A, p.slots, p.ids)
    p.slots.A[8:12] = value
    broken = run(p.X, p.slots.A, p.slots, p.ids)
    mine = p.ids == 1
    assert not broken[mine, :4].isfinite().all()
    assert torch.equal(broken[~mine], sound[~mine])
    X = p.X.clone()
    X[mine] = value
    p.slots.A[8:12] = 1
    assert torch.equal(run(X, p.slots.A, p.slots, p.ids)[~mine], sound[~mine])


def test_rows_and_ranks_beyond_2_31_elements(device):
    """Rows 2**30 elements apart in memory that is reserved, not touched: a 32-bit offset would wrap and trap."""
    p = make_multi_problem(mix_ids("distinct", 4, 2, device=device), 8, 4, (3, 2), torch.bfloat16)
    near = run(p.X, p.slots.A, p.slots, p.ids)
    for rows in (True, False):
        assert torch.equal(run(far_apart(p.X, rows), p.slots.A, p.slots, p.ids), near)
        assert torch.equal(run(p.X, far_apart(p.slots.A, rows), p.slots, p.ids), near)


def test_rows_without_an_adapter_are_not_read(device):
    p = make_multi_problem(mix_ids("half", 40, 3, run=3, device=device), 24, 40, (8, 4, 20), torch.bfloat16)
    sound = run(p.X, p.slots.A, p.slots, p.ids)
    p.X[p.ids < 0] = float("nan")
    assert torch.equal(run(p.X, p.slots.A, p.slots, p.ids), sound)


def test_no_slots_and_no_ranks(device):
    p = make_multi_problem(mix_ids("none", 5, 0, device=device), 8, 12, (), torch.float32)
    assert run(p.X, p.slots.A, p.slots, p.ids).shape == (5, 0)
    q = make_multi_problem(mix_ids("uniform", 5, 2, device=device), 8, 12, (2, 3), torch.float32)
    none = q.slots._replace(starts=q.slots.starts[:0], ranks=q.slots.ranks[:0], scalings=q.slots.scalings[:0])
    assert not run(q.X, q.slots.A, none, q.ids).any()


@pytest.mark.slow
def test_fuzz(device):
    pool = Pool()
    for number, case in enumerate(fuzz_mixes(150, seed=21)):
        check(problem_of(case), pool.assert_close, SMALL if number % 2 else LARGE)
    pool.close()
