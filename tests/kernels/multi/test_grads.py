"""multi_rows and multi_grads against fp64 by the error rule, on a GPU or in the strict interpreter."""

from dataclasses import replace

import pytest
import torch

from lora_kernels.kernels.multi import grads as module
from lora_kernels.kernels.multi.grads import multi_grads, multi_rows
from lora_kernels.kernels.tiles import SplitConfig
from lora_kernels.operands.dtypes import low_rank_dtype
from lora_kernels.testing import Pool, assert_close, poison
from lora_kernels.testing.multi import fuzz_mixes, make_multi_problem, mix_ids, multi_plain, multi_truth, problem_of
from lora_kernels.testing.multi_cases import REGIMES, far_apart, misplaced, multi_shrunk

SMALL = SplitConfig(16, 32, 32, num_warps=4, num_stages=1)
LARGE = SplitConfig(64, 64, 64, num_warps=4, num_stages=1)


def run(p, config=SMALL, spans=1, slots=None, need_a=True, need_b=True):
    """dA and dB in memory that holds NaN until it is written."""
    exact = (multi_shrunk(P, Q, p.slots, p.ids, torch.float64) for P, Q in ((p.X, p.slots.A), (p.dY, p.slots.B.t())))
    XA, dYB = (S.to(low_rank_dtype(p.X.dtype)) for S in exact)
    with poison():
        return multi_grads(
            p.dY, p.X, XA if need_b else None, dYB if need_a else None, slots or p.slots, p.ids, config, spans
        )


def check(p, close=assert_close, slots=None, **how):
    """By other ``slots`` where they are given, that are to mean the problem's own."""
    plain, truth = multi_plain(p), multi_truth(p)
    for name, got in zip(("dA", "dB"), run(p, slots=slots, **how), strict=True):
        true = getattr(truth, name)
        assert got.dtype == p.slots.A.dtype
        assert torch.equal(got[true == 0], true[true == 0].to(got.dtype)), f"{name} is not zero where no token is"
        close(got, getattr(plain, name), true, what=name, dtype=p.X.dtype)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("spans", [1, 3])
@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.name)
def test_regimes(regime, spans, device):
    check(regime.problem(device), config=SMALL if spans > 1 else LARGE, spans=spans)


def test_rows_of_every_slot_in_their_order(device, monkeypatch):
    monkeypatch.setattr(module, "ROWS_BLOCK", 16)
    for M, L in ((1, 1), (15, 3), (16, 2), (50, 5)):
        ids = torch.randint(-2, L + 2, (M,), generator=torch.Generator().manual_seed(M)).int().to(device)
        rows = multi_rows(ids, L)
        for slot in range(L):
            begin, count = int(rows.begins[slot]), int(rows.counts[slot])
            assert rows.order[begin : begin + count].tolist() == (ids == slot).nonzero()[:, 0].tolist()


def test_ids_that_name_no_slot_and_slots_that_point_outside(device):
    p = make_multi_problem(mix_ids("distinct", 40, 8, device=device), 24, 40, (5, 16, 3), torch.float32)
    given, meant = misplaced(p)
    # two slots of the eight share rows of A: the gradients of one of them alone
    p = replace(p, ids=torch.where(p.ids == 6, -1, p.ids))
    check(replace(p, slots=meant), slots=given)
    check(replace(p, slots=meant), slots=given, spans=3)
    wild = torch.tensor([0, -2, 3, 2**31 - 1, -(2**31), 1, 8, -1, 2] * 5, dtype=torch.int32, device=device)[:40]
    q = make_multi_problem(wild, 24, 40, (5, 16, 3), torch.float32)
    check(q)
    check(q, spans=3)


@pytest.mark.parametrize("spans", [1, 3])
def test_an_adapter_learns_what_it_would_alone(spans, device):
    """To the bit, one span: a slot's rows are brought together, whatever lies between them."""
    p = make_multi_problem(mix_ids("uniform", 70, 3, device=device), 24, 40, (8, 4, 20), torch.bfloat16)
    dA, dB = run(p, spans=spans)
    for slot in range(3):
        mine = p.ids == slot
        alone = run(replace(p, X=p.X[mine], dY=p.dY[mine], ids=p.ids[mine]), spans=spans)
        own = slice(int(p.slots.starts[slot]), int(p.slots.starts[slot] + p.slots.ranks[slot]))
        assert torch.equal(dA[own], alone[0][own])
        assert torch.equal(dB[:, own], alone[1][:, own])


@pytest.mark.parametrize("spans", [1, 3])
def test_same_bits_again_and_in_any_order_of_programs(spans, device):
    p = make_multi_problem(mix_ids("skewed", 70, 4, device=device), 40, 24, (8, 4, 20, 1), torch.bfloat16)
    first = run(p, spans=spans)
    for seed in (0, 1, 2):
        if device == "cpu":
            from lora_kernels.testing import interpreter

            interpreter.order(seed)
        assert all(torch.equal(a, b) for a, b in zip(first, run(p, spans=spans), strict=True))


@pytest.mark.parametrize("spans", [1, 2])
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, which interprets
def test_what_is_not_finite_in_one_adapters_rows_stays_with_it(spans, device):
    p = make_multi_problem(mix_ids("uniform", 40, 3, device=device), 24, 40, (8, 4, 20), torch.float16)
    sound = run(p, spans=spans)
    p.X[p.ids == 1] = p.dY[p.ids == 1] = float("nan")
    dA, dB = run(p, spans=spans)
    assert dA[8:12].isnan().all()
    assert dB[:, 8:12].isnan().all()
    others = [*range(8), *range(12, 32)]
    assert torch.equal(dA[others], sound[0][others])
    assert torch.equal(dB[:, others], sound[1][:, others])


def test_rows_without_an_adapter_are_not_read(device):
    p = make_multi_problem(mix_ids("half", 40, 3, run=3, device=device), 24, 40, (8, 4, 20), torch.bfloat16)
    sound = run(p)
    p.X[p.ids < 0] = p.dY[p.ids < 0] = float("nan")
    assert all(torch.equal(a, b) for a, b in zip(run(p), sound, strict=True))


@pytest.mark.parametrize("spans", [1, 3])
def test_what_is_not_asked_for_is_not_made(spans, device):
    p = make_multi_problem(mix_ids("uniform", 40, 3, device=device), 24, 40, (8, 4, 20), torch.bfloat16)
    dA, dB = run(p, spans=spans)
    assert torch.equal(run(p, spans=spans, need_b=False)[0], dA)
    assert torch.equal(run(p, spans=spans, need_a=False)[1], dB)
    assert run(p, spans=spans, need_a=False)[0] is None
    assert run(p, need_a=False, need_b=False) == (None, None)


def test_rows_and_columns_beyond_2_31_elements(device):
    """Rows 2**30 elements apart in memory that is reserved, not touched: a 32-bit offset would wrap and trap."""
    p = make_multi_problem(mix_ids("distinct", 4, 2, device=device), 4, 4, (3, 2), torch.bfloat16)
    near = run(p)
    for rows in (True, False):
        far = run(replace(p, X=far_apart(p.X, rows), dY=far_apart(p.dY, rows)))
        assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))


def test_no_slots_and_no_rows_of_any(device):
    p = make_multi_problem(mix_ids("none", 9, 2, device=device), 8, 12, (3, 2), torch.float32)
    for spans in (1, 4):
        dA, dB = run(p, spans=spans)
        assert not dA.any()
        assert not dB.any()
    q = make_multi_problem(mix_ids("none", 9, 2, device=device), 8, 12, (), torch.float32)
    dA, dB = run(q)
    assert (dA.shape, dB.shape) == ((0, 12), (8, 0))


def test_the_grid_fits_whatever_the_number_of_slots(device, monkeypatch):
    """Only the first axis of a grid goes beyond 65,535 programs."""
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            launched.append(grid)
            return lambda *args, **kwargs: None

    for name in ("_multi_rows_kernel", "_multi_grads_kernel", "_multi_sum_kernel"):
        monkeypatch.setattr(module, name, Kernel())
    p = make_multi_problem(mix_ids("none", 9, 2, device=device), 8, 12, (1, 1), torch.float32)
    many = {name: getattr(p.slots, name).repeat(35_000) for name in ("starts", "ranks", "scalings")}
    multi_grads(p.dY, p.X, p.X[:, :1], p.X[:, :1], p.slots._replace(**many), p.ids, SMALL, 4)
    assert len(launched) == 3
    assert all(size <= 65_535 for grid in launched for size in grid[1:])


@pytest.mark.slow
def test_fuzz(device):
    pool = Pool()
    for number, case in enumerate(fuzz_mixes(150, seed=23)):
        check(problem_of(case), pool.assert_close, config=SMALL if number % 2 else LARGE, spans=1 + number % 4)
    pool.close()
