"""The plans of stacked layers: launches as they are made, bytes below those of separate layers, the choice."""

import pytest
import torch

from lora_kernels.kernels.chip import CHIPS
from lora_kernels.planning import cost
from lora_kernels.planning import plans as variants
from lora_kernels.planning.stacked_cost import PLANS, StackedCallShape, candidates, choose, launches

QKV = StackedCallShape("fwd", 8192, (4096, 1024, 1024), 4096, (16, 16, 16), torch.bfloat16)


def names(plan, **how):
    return [launch.kernel for launch in launches(plan, StackedCallShape(**{**QKV.__dict__, **how}))]


def test_launches_in_order():
    assert names("eager") == ["XA", "matmul", "matmul", "matmul", "addmm_", "addmm_", "addmm_"]
    assert names("eager", adjacent=True) == ["XA", "matmul", "addmm_", "addmm_", "addmm_"]
    assert names("eager", one_scaling=False)[0] == names("eager", dropout=True)[0] == "shrink"
    assert names("shrink_extend") == ["shrink", "stacked_extend"]
    each = ["dyb_db", "reduce"] * 3
    assert names("shrink_extend", op="bwd") == [*each, "stacked_dx", "reduce"]
    assert names("shrink_extend", op="bwd", need_dx=False) == [*each, "da", "reduce"]
    assert names("shrink_extend", op="bwd", ranks=(64, 64, 64)) == [*each, "stacked_dx", "da", "reduce"]
    assert names("eager", op="bwd", dropout=True)[-3:] == ["expand", "da", "reduce"]


@pytest.mark.parametrize("op", ["fwd", "bwd"])
@pytest.mark.parametrize("plan", PLANS)
def test_fewer_bytes_than_separate_layers_for_the_same_flop(plan, op):
    q = StackedCallShape(**{**QKV.__dict__, "op": op})
    stacked = launches(plan, q)
    apart = [launch for p in range(3) for launch in variants.launches(plan, q.one(p))]
    x = q.dtype.itemsize * q.M * q.K
    saved = sum(launch.bytes for launch in apart) - sum(launch.bytes for launch in stacked)
    assert saved > (3 if op == "bwd" else 1.5) * x
    flop = sum(launch.flop for launch in apart)
    assert sum(launch.flop for launch in stacked) == pytest.approx(flop, rel=0.01)
    if op == "bwd":  # autograd adds the three dX of separate layers: two launches more than counted here
        assert len(stacked) < len(apart)


@pytest.mark.parametrize("arch", CHIPS)
def test_the_choice_is_the_least_prediction_and_a_name_overrules_it(arch):
    chip = CHIPS[arch]
    plans = candidates(QKV, chip)
    assert {plan.name for plan in plans} == set(PLANS)
    assert choose(QKV, chip).name == plans[0].name == min(plans, key=lambda plan: plan.seconds).name
    for name in PLANS:
        assert choose(QKV, chip, name).name == name
    assert choose(QKV, chip, "one_pass").name == plans[0].name
    assert plans[0].seconds == sum(cost.seconds(launch, QKV.dtype, chip) for launch in plans[0].launches)
