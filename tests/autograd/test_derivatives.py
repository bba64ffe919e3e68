"""Second derivatives, forward-mode derivatives, batched gradients and torch.func through every operator, in float64."""

import pytest
import torch

from tests.autograd.cases import DROPS, NAMES, case

CASES = [(name, 0.0, bias) for name in NAMES for bias in (True, False)] + [(name, 0.4, True) for name in DROPS]


def ids(params):
    return "-".join(map(str, params))


@pytest.mark.parametrize("given", CASES, ids=ids)
def test_derivatives_of_every_kind_against_finite_differences(given):
    function, leaves = case(*given)
    how = {"check_batched_grad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, **how)
    assert torch.autograd.gradgradcheck(function, leaves, check_fwd_over_rev=True, **how)


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_by_each_operand_alone(name):
    function, leaves = case(name)
    for wanted in range(len(leaves)):
        held = [T.detach().requires_grad_(i == wanted) for i, T in enumerate(leaves)]

        def of(T, held=held, wanted=wanted):
            return function(*held[:wanted], T, *held[wanted + 1 :])

        assert torch.autograd.gradgradcheck(of, (held[wanted],), fast_mode=True)
