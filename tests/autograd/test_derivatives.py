"""Second derivatives, forward-mode derivatives, batched gradients and torch.func through every operator, in float64."""

import pytest
import torch

import lora_kernels as lk
from tests.autograd.cases import DROPS, NAMES, case

CASES = [(name, 0.0, bias) for name in NAMES for bias in (True, False)] + [(name, 0.4, True) for name in DROPS]


def ids(params):
    return "-".join(map(str, params))


@pytest.mark.sampled(4)
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


@pytest.mark.parametrize("given", [(name, 0.0) for name in NAMES] + [(name, 0.4) for name in DROPS], ids=ids)
def test_vmap_over_every_operand(given):
    function, leaves = case(*given)
    leaves = [T.detach() for T in leaves]
    for i, T in enumerate(leaves):
        several = torch.stack([T, T.cos(), 2 * T])

        def of(T, i=i):
            return function(*leaves[:i], T, *leaves[i + 1 :])

        torch.testing.assert_close(torch.func.vmap(of)(several), torch.stack([of(T) for T in several]))


@pytest.mark.parametrize("name", NAMES)
def test_nested_transforms(name):
    function, leaves = case(name)
    leaves = tuple(T.detach() for T in leaves)
    every = tuple(range(len(leaves)))

    def loss(*leaves):
        return function(*leaves).square().sum()

    there = torch.func.jacfwd(torch.func.jacrev(loss, every), every)(*leaves)
    back = torch.func.jacrev(torch.func.jacfwd(loss, every), every)(*leaves)
    torch.testing.assert_close(there, back)
    direct = torch.autograd.functional.hessian(loss, leaves)
    torch.testing.assert_close(there, direct)


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_without_gradients(name):
    function, leaves = case(name)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = [torch.autograd.forward_ad.make_dual(T, T.cos()) for T in leaves]
        tangent = torch.autograd.forward_ad.unpack_dual(function(*dual)).tangent
    plain = tuple(T.detach() for T in leaves)
    torch.testing.assert_close(tangent, torch.func.jvp(function, plain, tuple(T.cos() for T in plain))[1])
    torch.testing.assert_close(
        tangent, torch.autograd.functional.jvp(function, plain, tuple(T.cos() for T in plain))[1]
    )


def test_a_trained_base_is_refused_but_where_a_transform_differentiates_by_it():
    layer = lk.LoRALinear(6, 5, r=2)
    params = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(3, 6)

    def loss(params):
        return torch.func.functional_call(layer, params, (x,)).sum()

    torch.testing.assert_close(torch.func.grad(loss)(params)["weight"], x.sum(0).expand(5, 6))
    layer.weight.requires_grad_()
    with pytest.raises(lk.FrozenWeightError):
        layer(x)


def test_norms_kept_before_and_after_a_transform_are_the_weights_own():
    layer = lk.DoRALinear(6, 5, r=2)
    torch.nn.init.normal_(layer.lora_B, std=0.3)
    x = torch.randn(3, 6)
    want = layer(x)
    params = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in layer.named_parameters() if "lora" in name}
    got = torch.func.vmap(lambda params: torch.func.functional_call(layer, params, (x,)))(params)
    torch.testing.assert_close(got[0], want)
    torch.testing.assert_close(layer(x), want)
    each = {name: p[1] for name, p in params.items()}
    torch.testing.assert_close(got[1], torch.func.functional_call(layer, each, (x,)))
