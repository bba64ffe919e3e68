"""Tests scalings that are not plain floats: fused if the value is a number, else PEFT's own forward with the reason."""

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_kernels as lk
from lora_kernels.check.compat.families import fill_adapters
from lora_kernels.integrations.peft.linear import CALLS, projection_of
from tests.integrations.peft.gated import K, plain_model
from tests.integrations.peft.siblings import adapted as siblings
from tests.integrations.peft.siblings import attention, example, learned

pytestmark = pytest.mark.usefixtures("nothing_left_over")


def one(kind):
    """Return a model of one layer of this kind with an adapter, and an input."""
    torch.manual_seed(0)
    base = {
        "conv": lambda: nn.Conv2d(4, 6, 3),
        "embedding": lambda: nn.Embedding(11, 6),
    }.get(kind, lambda: nn.Linear(8, 6))()
    config = LoraConfig(r=2, target_modules=["0"], use_dora=kind == "dora", init_lora_weights=False)
    model = get_peft_model(nn.Sequential(base), config)
    fill_adapters(model)
    x = {"conv": lambda: torch.randn(3, 4, 5, 5), "embedding": lambda: torch.arange(9).view(3, 3)}.get(
        kind, lambda: torch.randn(3, 8)
    )()
    return model.eval(), x


def layer_of(model):
    return model.base_model.model[0]


KINDS = ("linear", "conv", "embedding", "dora")
NUMBERS = {
    "int": lambda: 3,
    "float32": lambda: np.float32(1.5),
    "float64": lambda: np.float64(1.5),
    "int64": lambda: np.int64(2),
    "tensor": lambda: torch.tensor(1.5),
    "double tensor": lambda: torch.tensor(1.5, dtype=torch.float64),
    "half tensor": lambda: torch.tensor(1.5, dtype=torch.float16),
    "int tensor": lambda: torch.tensor(2),
    "parameter": lambda: nn.Parameter(torch.tensor(1.5), requires_grad=False),
}
OTHERS = {
    "trained": (lambda: torch.tensor(1.5, requires_grad=True), "requires a gradient"),
    "trained parameter": (lambda: nn.Parameter(torch.tensor(1.5)), "requires a gradient"),
    "one element": (lambda: torch.tensor([1.5]), "of shape (1,)"),
    "bool": (lambda: True, "is a bool"),
    "bool tensor": (lambda: torch.tensor(True), "is bool"),
    "complex": (lambda: 1.5 + 0j, "is a complex"),
    "array": (lambda: np.array(1.5, dtype=np.float32), "is a ndarray"),
    "nan": (lambda: float("nan"), "is nan"),
    "inf": (lambda: float("inf"), "is inf"),
    "inf tensor": (lambda: torch.tensor(float("-inf")), "is -inf"),
}


def results(model, x, scaling):
    layer = layer_of(model)
    layer.scaling["default"] = scaling
    y = model(x)
    if y.is_complex():
        return {"y": y}
    wanted = [p for p in model.parameters() if p.requires_grad]
    wanted += [scaling] if isinstance(scaling, torch.Tensor) and scaling.requires_grad else []
    return {"y": y, **dict(enumerate(torch.autograd.grad(y.square().sum(), wanted, allow_unused=True)))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_of_any_type_is_fused(kind, name):
    model, x = one(kind)
    ours = lk.accelerate(copy.deepcopy(model), verbose=False)
    expected, got = results(model, x, NUMBERS[name]()), results(ours, x, NUMBERS[name]())
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value)
    assert CALLS not in vars(layer_of(ours))
    assert "fused" in lk.explain(ours)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OTHERS)
def test_any_other_scaling_is_pefts_own_forward(kind, name):
    """Results are equal in every bit, also gradients of the scaling. If PEFT raises, the accelerated layer does."""
    make, reason = OTHERS[name]
    model, x = one(kind)
    ours = lk.accelerate(copy.deepcopy(model), verbose=False)
    try:
        expected = results(model, x, make())
    except (TypeError, RuntimeError) as error:
        with pytest.raises(type(error)):
            results(ours, x, make())
        assert reason in lk.explain(ours)
        return
    got = results(ours, x, make())
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=0, equal_nan=True)
    assert reason in lk.explain(ours)
    layer_of(ours).scaling["default"] = 2.0
    assert "PEFT's own forward took 1 calls (its scaling" in lk.explain(ours)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scaling_of_each_sample(kind):
    model, x = one(kind)
    ours = lk.accelerate(copy.deepcopy(model), verbose=False)
    scaling = torch.tensor([0.0, 1.0, 3.0]).view(3, *(1,) * (3 if kind == "conv" else 2 if kind == "embedding" else 1))
    if kind == "dora":
        scaling = scaling[:1]
    expected, got = results(model, x, scaling), results(ours, x, scaling)
    for key, value in expected.items():
        assert torch.equal(got[key], value)


def test_a_fraction_raises_what_peft_raises():
    model, x = one("linear")
    lk.accelerate(model, verbose=False)
    with pytest.raises(TypeError, match="Fraction"):
        results(model, x, Fraction(3, 2))
    assert "its scaling is a Fraction" in lk.explain(model)


def test_siblings_of_which_one_has_a_trained_scaling(counted):
    model, twin = learned(siblings()), siblings(group=False)
    scalings = [nn.Parameter(torch.tensor(1.5)) for _ in range(2)]
    counted.clear()
    for m, scaling in zip((model, twin), scalings, strict=True):
        attention(m).k.scaling["default"] = scaling
        m(example()).square().sum().backward()
    assert counted[0] == 2
    torch.testing.assert_close(scalings[0].grad, scalings[1].grad)
    assert scalings[0].grad.abs() > 0


@pytest.mark.parametrize(
    "change",
    [lambda s: s.mul_(3), lambda s: torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).view(5, 1), lambda s: 7.0],
    ids=["in place", "of each sample", "a number"],
)
def test_a_scaling_that_changes_between_siblings(change):
    """An output cached with the old scaling is not used."""
    model, twin = learned(siblings()), siblings(group=False)
    for m in (model, twin):
        block = attention(m)
        block.k.scaling["default"] = torch.tensor(2.0)

        def between(x, block=block):
            scaling = block.k.scaling["default"]
            block.k.scaling["default"] = scaling if change(scaling) is scaling else change(scaling)
            block.between = lambda x: None

        block.between = between
    torch.testing.assert_close(model(example()), twin(example()))


def test_a_gated_mlp_with_a_trained_scaling(whole):
    model = plain_model()
    ours = lk.accelerate(copy.deepcopy(model), verbose=False)
    x = torch.randn(3, K)
    ours(x)
    assert whole == [0.0, 0.0]
    whole.clear()
    grads = []
    for m in (model, ours):
        scaling = nn.Parameter(torch.tensor(1.5))
        m.base_model.model.blocks[1].b.scaling["default"] = scaling
        m(x).square().sum().backward()
        grads.append(scaling.grad)
    assert whole == [0.0]
    torch.testing.assert_close(*grads)


def test_a_mixed_batch_with_a_trained_scaling():
    model, x = one("linear")
    model.add_adapter("other", LoraConfig(r=3, target_modules=["0"]))
    fill_adapters(model)
    ours = lk.accelerate(copy.deepcopy(model), verbose=False)
    for m in (model, ours):
        layer_of(m).scaling["other"] = torch.tensor(1.5, requires_grad=True)
    names = ["default", "other", "__base__"]
    assert torch.equal(model(x, adapter_names=names), ours(x, adapter_names=names))
    assert "requires a gradient" in str(vars(layer_of(ours))[CALLS])


def test_pefts_own_ways_to_change_it_between_calls():
    model, x = one("linear")
    ours = lk.accelerate(copy.deepcopy(model), verbose=False)
    changes = [
        lambda layer: layer.set_scale("default", 3.0),
        lambda layer: layer.scale_layer(0.5),
        lambda layer: layer.unscale_layer(),
        lambda layer: layer.set_scale("default", torch.tensor(0.5)),
        lambda layer: layer.set_scale("default", torch.tensor([2.0, 1.0, 0.0]).view(3, 1)),
        lambda layer: layer.unscale_layer(),
    ]
    for change in changes:
        for m in (model, ours):
            change(layer_of(m))
        torch.testing.assert_close(ours(x), model(x))
    assert len(vars(layer_of(ours))[CALLS]) == 1


def test_the_layer_is_not_read_as_a_projection():
    model, x = one("linear")
    layer = layer_of(lk.accelerate(model, verbose=False))
    assert projection_of(layer, x) is not None
    layer.scaling["default"] = torch.tensor(2.0, requires_grad=True)
    assert projection_of(layer, x) is None
