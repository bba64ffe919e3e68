"""Which plan of the linear layer with many adapters runs, and what is refused."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels import ConfigError
from lora_kernels.errors import BackendUnavailableError
from lora_kernels.kernels.chip import CHIPS
from lora_kernels.planning import multi_plan
from lora_kernels.planning.multi_cost import MultiCallShape
from lora_kernels.testing.multi import make_multi_problem, mix_ids

H100 = CHIPS["sm_90"]
DECODE = MultiCallShape("fwd", 16, 4096, 4096, 8, 128, torch.bfloat16)
PREFILL = MultiCallShape("fwd", 8192, 4096, 4096, 8, 128, torch.bfloat16)


def names(problem):
    return {plan.name: plan.refused for plan in multi_plan.candidates(problem, H100)}


def test_launches_of_each_plan():
    def launches(problem, name):
        return [launch.kernel for launch in multi_plan.choose(problem, H100, name).launches]

    assert launches(DECODE, "decode") == ["multi_decode"]
    assert launches(PREFILL, "extend") == ["multi_shrink", "multi_extend"]
    assert launches(PREFILL, "eager") == ["multi_shrink", "matmul", "multi_expand"]
    bwd = MultiCallShape("bwd", 8192, 4096, 4096, 8, 128, torch.bfloat16)
    assert launches(bwd, "extend") == ["multi_shrink", "multi_extend", "multi_rows", "multi_grads"]


def test_decode_is_one_launch_and_the_choice_for_few_rows():
    plan = multi_plan.choose(DECODE, H100)
    assert (plan.name, len(plan.launches), plan.why) == ("decode", 1, "model")
    assert multi_plan.choose(PREFILL, H100).name != "decode"


def test_decode_costs_the_bytes_of_the_weight_and_of_the_adapters_that_are_there():
    (launch,) = multi_plan.choose(DECODE, H100).launches
    weight, adapters = 2 * 4096 * 4096, 2 * 128 * (4096 + 4096)
    assert launch.bytes == pytest.approx(weight + adapters, rel=0.01)
    (one,) = multi_plan.choose(MultiCallShape("fwd", 1, 4096, 4096, 8, 128, torch.bfloat16), H100).launches
    assert one.bytes == pytest.approx(weight + adapters / 8, rel=0.01)


@pytest.mark.parametrize(
    ("problem", "why"),
    [
        (MultiCallShape("fwd", 65, 64, 64, 2, 8, torch.bfloat16), "65 rows"),
        (MultiCallShape("fwd", 16, 64, 64, 2, 8, torch.bfloat16, need_xa=True), "no_grad"),
    ],
)
def test_decode_says_why_it_cannot_run(problem, why):
    assert why in names(problem)["decode"]
    with pytest.raises(BackendUnavailableError, match=why):
        multi_plan.choose(problem, H100, "decode")


def test_a_forward_plan_that_is_named_leaves_the_backward_to_the_planner():
    plan = multi_plan.choose(MultiCallShape("bwd", 16, 64, 64, 2, 8, torch.bfloat16), H100, "decode")
    assert plan.name in ("eager", "extend")
    assert "decode is a forward plan" in plan.why


def test_a_plan_can_be_switched_off(monkeypatch):
    multi_plan.candidates.cache_clear()
    monkeypatch.setenv("LORA_KERNELS_DISABLE", "decode,extend")
    found = names(DECODE)
    multi_plan.candidates.cache_clear()
    assert "switched off" in found["decode"]
    assert "switched off" in found["extend"]
    assert found["eager"] is None


def test_plans_of_other_layers_are_refused_by_name():
    with pytest.raises(BackendUnavailableError, match="none of multi_lora_linear's"):
        multi_plan.choose(DECODE, H100, "one_pass")
    p = make_multi_problem(mix_ids("uniform", 4, 2), 8, 12, (2, 2), torch.float32)
    with pytest.raises(ConfigError, match="accepted are"):
        lk.multi_lora_linear(p.X, p.W, p.slots, p.ids, backend="triton:fast")
    A, B = p.slots.A[:2], p.slots.B[:, :2]
    with pytest.raises(BackendUnavailableError, match="forward of multi_lora_linear"):
        lk.lora_linear(p.X, p.W, A, B, backend="cuda")
