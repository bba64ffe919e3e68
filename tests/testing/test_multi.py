"""Mixes follow their names, problems keep their promises, and the oracle sees a lost adapter."""

import pytest
import torch

from lora_kernels.testing import within_rule
from lora_kernels.testing.multi import (
    DISTRIBUTIONS,
    fuzz_mixes,
    make_multi_problem,
    mix_ids,
    multi_plain,
    multi_truth,
    problem_of,
)


def test_mixes_are_what_their_names_say():
    assert mix_ids("distinct", 6, 4).tolist() == [0, 1, 2, 3, 0, 1]
    assert mix_ids("identical", 3, 4).tolist() == [0, 0, 0]
    assert mix_ids("none", 3, 4).tolist() == [-1, -1, -1]
    half = mix_ids("half", 100, 4)
    assert (half[::2] >= 0).all()
    assert (half[1::2] == -1).all()
    assert mix_ids("distinct", 5, 3, run=2).tolist() == [0, 0, 1, 1, 2]
    counts = torch.bincount(mix_ids("skewed", 4000, 4), minlength=4)
    assert counts.tolist() == sorted(counts.tolist(), reverse=True)
    assert counts[3] > 0
    uniform = torch.bincount(mix_ids("uniform", 4000, 4), minlength=4)
    assert (uniform - 1000).abs().max() < 150
    for name in DISTRIBUTIONS:
        assert mix_ids(name, 7, 3, run=4).dtype == torch.int32
        assert torch.equal(mix_ids(name, 7, 3, seed=1), mix_ids(name, 7, 3, seed=1))
        assert mix_ids(name, 0, 3).shape == (0,)
    with pytest.raises(ValueError, match="accepted are distinct"):
        mix_ids("zipf", 3, 3)


def test_the_lora_term_of_every_slot_is_as_large_as_the_base_term():
    ids = mix_ids("distinct", 800, 4)
    p = make_multi_problem(ids, 64, 64, (2, 4, 8, 16), torch.float32, bias=False)
    base = p.X @ p.W.T
    update = multi_truth(p).Y.float() - base
    for slot in range(4):
        rows = ids == slot
        assert 0.6 < update[rows].norm() / base[rows].norm() < 1.6


def test_a_pool_layout_has_gaps_of_nan_and_gives_the_same_answers_kind():
    p = make_multi_problem(mix_ids("uniform", 9, 3), 8, 12, (4, 0, 2), torch.float32, pool_layout=True, gap=2)
    assert p.slots.B.stride(0) == 1
    assert p.slots.starts.tolist() == [8, 6, 2]
    assert p.slots.A[:2].isnan().all()
    for result in (multi_truth(p), multi_plain(p)):
        assert result.Y.isfinite().all()
        assert result.dX.isfinite().all()


@pytest.mark.parametrize("lost", ["row", "slot", "scaling"])
def test_the_oracle_sees_what_is_lost(lost):
    ids = mix_ids("uniform", 64, 4)
    p = make_multi_problem(ids, 32, 48, (4, 8, 2, 16), torch.bfloat16)
    changed, slots = ids.clone(), p.slots
    if lost == "row":
        changed[5] = -1
    if lost == "slot":
        changed[changed == 2] = 1
    if lost == "scaling":
        slots = slots._replace(scalings=slots.scalings * 1.05)
    wrong = multi_plain(type(p)(p.X, p.W, p.bias, p.dY, slots, changed))
    assert not within_rule(wrong.Y, multi_plain(p).Y, multi_truth(p).Y)


def test_fuzzed_mixes_reach_the_edges():
    cases = list(fuzz_mixes(400, seed=1))
    assert len(set(cases)) == 400
    assert {case.distribution for case in cases} == set(DISTRIBUTIONS)
    assert any(0 in case.ranks for case in cases)
    assert any(case.M == 1 for case in cases)
    assert {case.dtype for case in cases} == {torch.float16, torch.bfloat16, torch.float32}
    assert problem_of(cases[0]).X.dtype == cases[0].dtype
    assert cases[:5] == list(fuzz_mixes(5, seed=1))
