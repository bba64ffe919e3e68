import dataclasses

import pytest
import torch

from benchmarks import rivals
from benchmarks.checks import step
from benchmarks.rivals import ADDMM_CHAIN, FROZEN, MERGE, PEFT, PEFT_FP32, Implementation, contenders
from lora_kernels.testing import make_problem, truth

PROBLEM = make_problem(33, 40, 24, 4, torch.float32, bias=True)


@pytest.mark.parametrize("rival", [PEFT, PEFT_FP32, ADDMM_CHAIN, MERGE, rivals.PEFT_COMPILED], ids=lambda r: r.name)
def test_a_rival_computes_the_lora_layer_and_its_gradients(rival: Implementation) -> None:
    exact = truth(PROBLEM)
    got = step(rival.build(PROBLEM, None), PROBLEM.X, PROBLEM.dY, backward=True)
    assert list(got) == ["Y", "dX", "dA", "dB"]
    for name, tensor in got.items():
        torch.testing.assert_close(tensor.double(), getattr(exact, name), rtol=1e-4, atol=1e-4)


def test_the_chain_applies_one_mask_in_all_its_products() -> None:
    problem = dataclasses.replace(PROBLEM, p=0.4)
    torch.manual_seed(5)
    keep = torch.native_dropout(problem.X, 0.4, True)[1]
    torch.manual_seed(5)
    got = step(ADDMM_CHAIN.build(problem, None), problem.X, problem.dY, backward=True)
    exact = truth(problem, keep)
    for name, tensor in got.items():
        torch.testing.assert_close(tensor.double(), getattr(exact, name), rtol=1e-4, atol=1e-4)


def test_peft_drops_while_it_is_measured() -> None:
    layer = PEFT.build(dataclasses.replace(PROBLEM, p=0.5), None)
    with torch.no_grad():
        assert not torch.equal(layer.forward(PROBLEM.X), layer.forward(PROBLEM.X))


def test_pefts_adapters_have_the_dtype_their_name_says() -> None:
    problem = make_problem(8, 16, 16, 2, torch.bfloat16)
    assert {p.dtype for p in PEFT.build(problem, None).params} == {torch.bfloat16}
    assert {p.dtype for p in PEFT_FP32.build(problem, None).params} == {torch.float32}


def test_a_rival_shares_the_problems_weight() -> None:
    before = PROBLEM.W.clone()
    for rival in (FROZEN, PEFT, ADDMM_CHAIN, MERGE):
        step(rival.build(PROBLEM, None), PROBLEM.X, PROBLEM.dY, backward=True)
    assert torch.equal(PROBLEM.W, before)


def test_the_merge_counts_as_a_rival_only_where_it_keeps_the_update() -> None:
    assert MERGE.is_rival(torch.float32)
    assert not MERGE.is_rival(torch.bfloat16)
    assert not FROZEN.is_rival(torch.float32)
    assert not rivals.ours("reference").is_rival(torch.float32)


def test_a_library_that_is_not_installed_is_named() -> None:
    absent = dataclasses.replace(PEFT, needs="no_such_library")
    assert absent.missing() == "no_such_library is not installed"
    assert FROZEN.missing() is None


def test_default_adapters_in_fp32_run_beside_16_bit_ones() -> None:
    assert "lora_kernels fp32 adapters" in [each.name for each in contenders(torch.bfloat16)]
    assert "lora_kernels fp32 adapters" not in [each.name for each in contenders(torch.float32)]
