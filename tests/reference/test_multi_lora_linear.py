"""The reference of mixed batches against every row alone, in float64 and by the error rule."""

import pytest
import torch

from lora_kernels import reference
from lora_kernels.operands.slots import Slots
from lora_kernels.reference import GradMask
from lora_kernels.reference.multi_lora_linear import parts
from lora_kernels.testing import Pool
from lora_kernels.testing.multi import (
    DISTRIBUTIONS,
    fuzz_mixes,
    make_multi_problem,
    mix_ids,
    multi_plain,
    multi_truth,
    problem_of,
)


def results(p):
    Y, XA = reference.multi_lora_linear_fwd(p.X, p.W, p.slots, p.ids, p.bias)
    needs = GradMask(bias=p.bias is not None)
    return Y, *reference.multi_lora_linear_bwd(p.dY, p.X, p.W, p.slots, p.ids, XA, needs)


@pytest.mark.parametrize("shard", range(3))
def test_fuzz(shard):
    pool = Pool()
    for case in fuzz_mixes(60, seed=shard):
        p = problem_of(case)
        for name, got, plain, truth in zip(
            ("Y", "dX", "dA", "dB", "dbias"), results(p), multi_plain(p), multi_truth(p), strict=True
        ):
            if truth is not None and truth.numel():
                pool.assert_close(got, plain, truth, what=name)
    pool.close()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_each_distribution_is_exact_in_float64(distribution):
    ids = mix_ids(distribution, 24, 5, run=2)
    p = make_multi_problem(ids, 20, 28, (4, 0, 7, 1, 16), torch.float64)
    for got, truth in zip(results(p), multi_truth(p), strict=True):
        assert torch.allclose(got, truth, rtol=1e-12, atol=1e-12)


def test_an_adapters_gradients_are_those_of_its_own_rows_alone():
    ids = mix_ids("uniform", 60, 4, seed=5)
    p = make_multi_problem(ids, 24, 32, (3, 8, 5, 2), torch.float64, bias=False)
    _, _, dA, dB, _ = results(p)
    for slot, (first, r) in enumerate(zip(p.slots.starts.tolist(), p.slots.ranks.tolist(), strict=True)):
        rows = (ids == slot).nonzero()[:, 0]
        own = slice(first, first + r)
        A, B, s = p.slots.A[own], p.slots.B[:, own], float(p.slots.scalings[slot])
        _, XA = reference.lora_linear_fwd(p.X[rows], p.W, A, B, None, s)
        alone = reference.lora_linear_bwd(p.dY[rows], p.X[rows], p.W, A, B, XA, s)
        assert torch.allclose(dA[own], alone[1], rtol=1e-12)
        assert torch.allclose(dB[:, own], alone[2], rtol=1e-12)


def test_ids_and_slots_that_name_nothing_give_the_base_alone():
    ids = torch.tensor([-1, -7, 2, 99, 1, 2**31 - 1], dtype=torch.int32)
    p = make_multi_problem(torch.full((6,), -1), 8, 12, (4, 0), torch.float32)
    Y, XA = reference.multi_lora_linear_fwd(p.X, p.W, p.slots, ids, p.bias)
    assert torch.equal(Y, torch.nn.functional.linear(p.X, p.W, p.bias))
    assert not XA.any()


def test_a_rank_or_start_beyond_the_buffers_is_clamped():
    p = make_multi_problem(torch.zeros(4, dtype=torch.int32), 8, 12, (4, 4), torch.float32)
    for starts, ranks, width in (((6, 0), (4, 4), 2), ((0, 0), (9, 4), 4), ((-3, 0), (4, 4), 0), ((8, 0), (4, 4), 0)):
        slots = p.slots._replace(
            starts=torch.tensor(starts, dtype=torch.int32), ranks=torch.tensor(ranks, dtype=torch.int32)
        )
        found = list(parts(slots, p.ids))
        assert [part.r for part in found] == ([width] if width else [])


def test_neighbours_are_a_slice_and_others_are_gathered():
    slots = Slots.of([torch.ones(1, 3)] * 3, [torch.ones(2, 1)] * 3, None, 1.0)
    a, b, c = parts(slots, torch.tensor([0, 0, 1, 2, 1, 2]))
    assert a.rows == slice(0, 2)
    assert b.rows.tolist() == [2, 4]
    assert c.rows.tolist() == [3, 5]


def test_needs_leave_out_what_is_not_asked_for():
    p = make_multi_problem(mix_ids("uniform", 9, 3), 8, 12, (4, 2, 1), torch.float32)
    XA = reference.multi_lora_linear_fwd(p.X, p.W, p.slots, p.ids, p.bias)[1]
    whole = reference.multi_lora_linear_bwd(p.dY, p.X, p.W, p.slots, p.ids, XA, GradMask(True, True, True, True))
    for place in range(4):
        needs = GradMask(*(i == place for i in range(4)))
        one = reference.multi_lora_linear_bwd(p.dY, p.X, p.W, p.slots, p.ids, XA, needs)
        assert [g is not None for g in one] == list(needs)
        assert torch.equal(one[place], whole[place])
