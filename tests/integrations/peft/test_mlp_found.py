"""Tests which blocks are found to be gated MLPs, and how their own classes are restored."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout, gelu, silu
from transformers.activations import SiLUActivation

import lora_kernels as lk
from lora_kernels.integrations.peft import accelerate, decelerate
from lora_kernels.integrations.peft.linear import BLOCK
from lora_kernels.integrations.peft.mlp import GatedMLP, Names, dissolve_mlps, form_mlps, mlps_of
from tests.integrations.peft.gated import Gated, K, Net, adapted, blocks, by_rule, example, gradients, plain_model


class Swapped(Gated):
    def forward(self, hidden):
        gate = self.a(hidden)
        return self.c(gate * self.act(self.b(hidden)))


class ByHand(Gated):
    def __init__(self):
        super().__init__()
        self.act = SiLUActivation()

    def forward(self, x):
        return self.c(silu(self.a(x)) * self.b(x))


class NoActivation(Gated):
    def forward(self, x):
        return self.c(self.a(x) * self.b(x))


class Scaled(Gated):
    def forward(self, x):
        return self.c(self.act(self.a(x)) * self.b(x) * 1.0001)


class Clamped(Gated):
    def forward(self, x):
        return self.c(self.act(self.a(x).clamp(max=100.0)) * self.b(x))


class Drops(Gated):
    def forward(self, x):
        return self.c(dropout(self.act(self.a(x)) * self.b(x), 0.3, self.training))


class Residual(Gated):
    def forward(self, x):
        return x + super().forward(x)


class OnEitherSide(Gated):
    def forward(self, x):
        return self.c(self.act(self.a(x)) * self.act(self.b(x)))


class AnotherActivation(Gated):
    def forward(self, x):
        return self.c(gelu(self.a(x)) * self.b(x))


class TwoInputs(Gated):
    def forward(self, x, scale=1.0):
        return self.c(self.act(self.a(x)) * self.b(x)) * scale


class TwoOutputs(Gated):
    def forward(self, x):
        return super().forward(x), None


class Raises(Gated):
    def forward(self, x):
        raise KeyError("x")


class OwnParameter(Gated):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))


class Square(Gated):
    def __init__(self):
        super().__init__(K, K)


class Alike(Gated):
    def __init__(self):
        super().__init__()
        self.b.load_state_dict(self.a.state_dict())


class MoreChildren(Gated):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(K)


class ReadsWeight(Gated):
    def forward(self, x):
        return self.c(self.act(nn.functional.linear(x, self.a.weight)) * self.b(x))


class HalfClamped(Gated):
    def forward(self, x):
        H = self.act(self.a(x)) * self.b(x)
        return self.c(H.clamp(-10.0, 10.0) if x.dtype is torch.bfloat16 else H)


class GELU(Gated):
    def __init__(self):
        super().__init__()
        self.act = nn.GELU()


NAMES = {Gated: ("a", "b", "c", "act"), Swapped: ("b", "a", "c", "act"), ByHand: ("a", "b", "c", "act")}


@pytest.mark.parametrize(("kind", "names"), NAMES.items())
@pytest.mark.parametrize("bias", [False, True])
def test_the_gate_is_found_whatever_the_names(kind, names, bias, whole):
    net = Net(kind) if kind is ByHand else Net(kind, bias=bias)
    plain = plain_model(net=net, rank_pattern={"b": 2}, alpha_pattern={"c": 3}, lora_bias=bias)
    ours = accelerate(copy.deepcopy(plain), verbose=False)
    assert list(mlps_of(ours).values()) == [Names(*names)] * 2
    got = gradients(ours)
    assert whole == [0.0, 0.0]
    by_rule(got, gradients(plain), gradients(copy.deepcopy(plain).double(), example().double()))


DECOYS = [
    NoActivation, Scaled, Clamped, Drops, Residual, OnEitherSide, AnotherActivation, TwoInputs, TwoOutputs, Raises,
    OwnParameter, Square, MoreChildren, ReadsWeight, GELU,
]  # fmt: skip


@pytest.mark.parametrize("kind", DECOYS)
def test_what_computes_something_else_is_left_as_it_is(kind):
    model = adapted(kind)
    assert mlps_of(model) == {}
    assert {type(block) for block in blocks(model)} == {kind}
    assert not any(BLOCK in module.__dict__ for module in model.modules())


def test_what_depends_on_the_dtype_is_seen_in_the_dtype_of_the_layers():
    assert len(mlps_of(adapted(HalfClamped))) == 2
    assert mlps_of(adapted(net=Net(HalfClamped).bfloat16())) == {}


def test_gate_and_up_are_told_apart_by_the_source_not_by_their_weights():
    model = adapted(Alike, fill=False)
    assert list(mlps_of(model).values()) == [Names("a", "b", "c", "act")] * 2
    assert len(mlps_of(adapted(net=Net().to("meta"), fill=False))) == 2


def test_a_patched_block_is_left_as_it_is():
    model = plain_model()
    blocks(model)[1].forward = lambda x: x
    assert list(mlps_of(accelerate(model, verbose=False))) == ["base_model.model.blocks.0"]


def test_a_trial_leaves_no_trace():
    model = adapted(p=0.3, group=False)
    model.disable_adapter_layers()
    blocks(model)[0].a.eval()
    held = [dict(vars(module)) for module in model.modules()]
    drops = adapted(Drops, group=False)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert len(form_mlps(model)) == 2
    assert form_mlps(drops) == {}
    assert torch.equal(torch.get_rng_state(), state)
    dissolve_mlps(model)
    assert [dict(vars(module)) for module in model.modules()] == held
    assert {type(block) for block in blocks(model)} == {Gated}


def test_the_class_passes_for_the_blocks_own():
    model = adapted()
    block = blocks(model)[0]
    kind = type(block)
    assert isinstance(block, Gated)
    assert isinstance(block, GatedMLP)
    assert (kind.__name__, kind.__qualname__, kind.__module__) == ("Gated", Gated.__qualname__, Gated.__module__)
    assert kind is type(blocks(model)[1])
    assert [*model.state_dict()] == [*plain_model().state_dict()]
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain_model().named_modules()]
    assert accelerate(model, verbose=False) is model
    assert type(block) is kind


def test_group_false_and_decelerate_take_it_back(capsys):
    model = accelerate(plain_model())
    told = "lora_kernels: 2 gated MLPs run whole in training, a + b + c in one call\n"
    assert capsys.readouterr().out.endswith(told)
    assert "fused; in training a + b + c in one call" in lk.explain(model)
    for undo in (lambda m: accelerate(m, verbose=False, group=False), decelerate):
        accelerate(model, verbose=False)
        assert len(mlps_of(model)) == 2
        undo(model)
        assert mlps_of(model) == {}
        assert {type(block) for block in blocks(model)} == {Gated}
        assert "in one call" not in lk.explain(model)
