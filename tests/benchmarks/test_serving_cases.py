import pytest
import torch

from benchmarks.serving_cases import CHECKED, DECODE, LAYERS, PREFILL, TARGETS, cpu_cases, other_mixes, served, tiny


def test_tables_cover_what_is_asked_for() -> None:
    assert {case.phase for case in DECODE} == {"decode"}
    assert {case.phase for case in PREFILL} == {"prefill"}
    assert {case.L for case in DECODE} >= {1, 8, 32}
    assert {case.distribution for case in (*DECODE, *CHECKED)} == {
        "distinct", "uniform", "skewed", "identical", "none", "half",
    }  # fmt: skip
    assert {"16", "8-64"} <= {case.ranks_shown for case in DECODE}
    assert {case.M for case in PREFILL} >= {512, 2048, 4096, 8192}
    assert set(LAYERS["llama-3-8b"].values()) <= {(case.N, case.K) for case in (*DECODE, *PREFILL)}
    assert len(set(DECODE)) == len(DECODE)
    assert len(set(PREFILL)) == len(PREFILL)


def test_eight_adapters_aim_at_the_floor() -> None:
    eight = next(target for target in TARGETS if target.case.M == 32)
    assert eight.case.rows_of.keys() == set(range(8))
    assert eight.aim == pytest.approx(1 + 8 * 16 * (4096 + 4096) / 4096**2 + 0.05)
    assert eight.must == 1.15


def test_64_sequences_of_bert() -> None:
    cases = list(cpu_cases(torch.float32, [1, 16]))
    assert [(case.M, case.sequence) for case in cases] == [(64, 1)] * 6 + [(1024, 16)] * 6
    assert {(case.N, case.K) for case in cases} == {(768, 768), (3072, 768), (768, 3072)}
    assert all(case.bias and case.L == 8 for case in cases)
    assert {case.distribution for case in other_mixes(torch.float32)} >= {"none", "half", "identical"}
    assert {case.L for case in other_mixes(torch.float32)} == {1, 8, 32}


def test_tiny_cases_are_of_the_same_kind() -> None:
    for case in (*DECODE, *PREFILL, *CHECKED):
        small = tiny(case)
        assert (small.phase, small.distribution, small.dtype) == (case.phase, case.distribution, case.dtype)
        assert small.M * small.N * small.K < 500_000
    assert tiny(served(64, ranks="8-64")).ranks == (2, 2, 3, 4)
