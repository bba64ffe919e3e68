import dataclasses

import pytest
import torch
from torch import Tensor

from benchmarks import checks
from benchmarks.cases import Case
from benchmarks.checks import Oracle, judge, problem_of, same_bits
from benchmarks.rivals import FROZEN, TRITON_BACKENDS, Implementation, Layer, ours
from lora_kernels.testing import Problem

NAMED = TRITON_BACKENDS[1:]
CASE = Case(33, 80, 72, 5, 0.1)


@pytest.mark.parametrize("backend", [*TRITON_BACKENDS, "reference"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_what_is_right_is_judged_right(device: str, backend: str, p: float) -> None:
    case = dataclasses.replace(CASE, p=p)
    found = list(judge(case, Oracle(problem_of(case, torch.device(device), bias=True)), ours(backend)))
    assert [check.what for check in found] == list(checks.RESULTS)
    assert {check.status for check in found} == {"ok"}


def test_a_layer_without_its_update_is_judged_wrong(device: str) -> None:
    oracle = Oracle(problem_of(CASE, torch.device(device)))
    without = dataclasses.replace(ours("reference"), build=lambda problem, seed: FROZEN.build(problem, seed))
    assert [check.status for check in judge(CASE, oracle, without, backward=False)] == ["failed"]


def test_a_rival_without_its_update_is_judged_wrong(device: str) -> None:
    oracle = Oracle(problem_of(CASE, torch.device(device)))
    (check,) = judge(CASE, oracle, dataclasses.replace(FROZEN, name="empty"), backward=False)
    assert check.status == "failed"
    assert "relative error" in check.message


def test_a_refusal_is_no_failure(device: str) -> None:
    case = dataclasses.replace(CASE, r=66)
    (check,) = judge(case, Oracle(problem_of(case, torch.device(device))), ours("triton:one_pass"))
    assert check.status == "refused"
    assert "r=66" in check.message


def test_bits_that_change_are_noticed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steady = list(same_bits(CASE, torch.device(device), "triton:shrink_extend"))
    assert {check.status for check in steady} == {"ok"}

    def restless(problem: Problem, seed: Tensor | None) -> Layer:
        layer = ours("reference").build(problem, None)
        return Layer(lambda X: layer.forward(X) + torch.rand_like(problem.dY), layer.params)

    def fickle(backend: str) -> Implementation:
        return dataclasses.replace(ours(backend), build=restless)

    monkeypatch.setattr(checks, "ours", fickle)
    found = {check.what: check.status for check in same_bits(CASE, torch.device(device), "reference")}
    assert found["Y"] == "failed"
