import pytest
import torch

from lora_kernels.check.serving.cases import ServingCase, check_distribution, ranks_from
from lora_kernels.errors import ConfigError


def test_ranks_are_all_alike_in_turn_or_mixed():
    assert ranks_from("16", 3) == (16, 16, 16)
    assert ranks_from("4,9", 3) == (4, 9, 4)
    assert ranks_from("8-64", 9) == (8, 16, 24, 32, 40, 48, 56, 64, 8)
    for wrong in ("", "0", "8-", "a", "8;9"):
        with pytest.raises(ConfigError, match="accepted are"):
            ranks_from(wrong, 2)


def test_distributions_are_known_by_name():
    assert check_distribution("skewed") == "skewed"
    with pytest.raises(ConfigError, match="distinct, uniform"):
        check_distribution("zipf")


def test_work_counts_true_ranks_and_the_adapters_in_the_batch_once():
    case = ServingCase(4, 10, 6, (2, 8, 3), "distinct", dtype=torch.bfloat16)  # slots 0, 1, 2, 0
    assert case.rows_of == {0: 2, 1: 1, 2: 1}
    assert case.flop == 2 * 4 * 10 * 6 + 2 * (2 + 8 + 3 + 2) * 16
    assert case.bytes == 2 * (60 + 4 * 16 + 13 * 16)
    assert case.floor == pytest.approx(1 + 13 * 16 / 60)
    alone = ServingCase(4, 10, 6, (2, 8, 3), "none")
    assert (alone.flop, alone.floor) == (480, 1.0)


def test_a_case_says_what_it_is():
    case = ServingCase(128, 32, 24, ranks_from("8-64", 8), "half", 16)
    assert str(case) == "M128 in 16s N32 K24 L8 r8-64 half bfloat16"
    assert (case.phase, ServingCase(64, 8, 8, (4,)).phase) == ("prefill", "decode")
    assert (case.ids.view(8, 16) == case.ids.view(8, 16)[:, :1]).all(), "a sequence has one adapter"
    assert (case.ids == -1).sum() == 64


def test_the_problem_lies_as_in_a_pool():
    problem = ServingCase(5, 12, 8, (2, 4), "uniform", bias=True).problem()
    assert problem.slots.B.stride(0) == 1
    assert problem.slots.starts.tolist() == [4, 0]
    assert problem.bias is not None
