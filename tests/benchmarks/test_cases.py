import pytest
import torch

from benchmarks.cases import CHECKED, FEW_ROWS, TARGET_CASES, TARGETS, Case, checked_cases, parse, tiny


def test_every_target_is_measured() -> None:
    assert {target.case for target in TARGETS} <= set(TARGET_CASES)
    assert all(target.aim < target.must for target in TARGETS)


def test_no_checked_result_is_too_small_for_the_error_rule() -> None:
    for case in [*CHECKED, *(tiny(case) for case in CHECKED)]:
        results = (case.M * case.N, case.M * case.K, case.r * case.K, case.N * case.r, case.N)
        assert min(results) >= 64, case


def test_checked_cases_begin_with_bf16_and_cover_every_dtype_with_and_without_dropout() -> None:
    cases = checked_cases()
    assert cases[0].dtype == torch.bfloat16
    covered = {(case.dtype, case.p > 0) for case in cases}
    assert covered == {(d, p) for d in (torch.bfloat16, torch.float16, torch.float32) for p in (False, True)}


def test_a_tiny_case_keeps_what_chooses_the_code_path() -> None:
    kept = ("p", "dtype", "strided", "fp32_adapters")
    for case in [*checked_cases(), *TARGET_CASES, *FEW_ROWS]:
        small = tiny(case)
        assert [getattr(small, name) for name in kept] == [getattr(case, name) for name in kept]
        assert small.M <= 40
        assert (small.r > 64) == (case.r > 64)
        assert (small.r > 16) == (case.r > 16)


def test_a_models_name_stands_for_all_its_layers() -> None:
    cases = parse("bert-base", torch.float32, 0.1, tokens=512, r=8)
    assert [(case.M, case.N, case.K, case.r, case.p) for case in cases] == [
        (512, 768, 768, 8, 0.1),
        (512, 3072, 768, 8, 0.1),
        (512, 768, 3072, 8, 0.1),
    ]


def test_shapes_by_number() -> None:
    assert parse("4,5,6,7; 8,9,10,11", torch.float32, 0.0, 1, 1) == [
        Case(4, 5, 6, 7, dtype=torch.float32),
        Case(8, 9, 10, 11, dtype=torch.float32),
    ]


@pytest.mark.parametrize("text", ["", "1,2,3", "0,2,3,4", "gpt", "1,2,3,4;"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no shape"):
        parse(text, torch.float32, 0.0, 1, 1)
