"""The mixed batches that kernels are judged on, and the products row by row."""

import pytest
import torch

from lora_kernels.testing.multi import make_multi_problem, mix_ids
from lora_kernels.testing.multi_cases import REGIMES, apart, far_apart, misplaced, multi_shrunk


@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.name)
def test_a_regime_is_what_it_says(regime):
    p = regime.problem()
    assert (*p.X.shape, p.W.shape[0]) == (regime.M, regime.K, regime.N)
    assert p.slots.ranks.tolist() == list(regime.ranks)
    assert p.X.dtype == regime.dtype
    assert not regime.strided or not any(T.is_contiguous() for T in (p.X, p.W, p.slots.A, p.dY))


def test_views_hold_the_same_values_and_nan_between():
    p = make_multi_problem(mix_ids("uniform", 9, 2), 8, 12, (4, 2), torch.float32)
    q = apart(p)
    for ours, theirs in ((q.X, p.X), (q.W, p.W), (q.dY, p.dY), (q.slots.A, p.slots.A), (q.slots.B, p.slots.B)):
        assert torch.equal(ours, theirs)
    assert q.X.as_strided((1,), (1,), 12).isnan()
    assert q.dY.as_strided((1,), (1,), 1).isnan()


def test_far_rows_and_far_columns():
    matrix = torch.randn(3, 2)
    for rows in (True, False):
        far = far_apart(matrix, rows)
        assert torch.equal(far, matrix)
        assert far.stride() == ((2**30, 1) if rows else (1, 2**30))


def test_rows_times_their_own_adapter():
    p = make_multi_problem(torch.tensor([1, -1, 0, 7, 1], dtype=torch.int32), 8, 12, (4, 2), torch.float64)
    S = multi_shrunk(p.X, p.slots.A, p.slots, p.ids, torch.float64)
    scalings = p.slots.scalings.double()
    assert torch.allclose(S[2], scalings[0] * p.slots.A[:4] @ p.X[2])
    assert torch.allclose(S[[0, 4], :2], scalings[1] * p.X[[0, 4]] @ p.slots.A[4:].T)
    assert not S[[1, 3]].any()
    assert not S[[0, 4], 2:].any()


def test_misplaced_slots_keep_what_lies_inside():
    p = make_multi_problem(mix_ids("uniform", 4, 2), 8, 12, (5, 4), torch.float32)
    given, meant = misplaced(p)
    assert given.starts.tolist()[:4] == [-1, 9, 2**31 - 1, -(2**31)]
    assert meant.ranks.tolist() == [0, 0, 0, 0, 2, 0, 5, 0]
