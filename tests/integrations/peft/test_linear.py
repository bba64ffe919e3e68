"""Compares FusedLinear with PEFT's own forward: numbers by the error rule, and which of the two ran."""

import functools

import pytest
import torch
from peft.tuners.lora.layer import LoraVariant

from lora_kernels.integrations.peft import accelerate
from tests.integrations.peft.changes import LAYERS, each, freeze, layers, second_adapter, to, train_base

HALF = (torch.float16, torch.bfloat16)
UNSCALED = {"rank_pattern": {"first": 7, "third": 1}, "alpha_pattern": {"second": 3}}


def train_biases(model):
    for layer in layers(model):
        if layer.base_layer.bias is not None:
            layer.base_layer.bias.requires_grad_(True)


def in_two_dtypes(model):
    to(torch.bfloat16, "lora_A", "lora_B")(model)
    second_adapter()(model)


# set up before the comparison: LoraConfig's fields, and a change of the adapted model
FUSED = {
    "plain": ({}, None),
    "ranks and alphas": (UNSCALED, None),
    "rsLoRA": ({"use_rslora": True}, None),
    "lora_bias": ({"lora_bias": True}, each(lambda layer: layer.lora_B["default"].bias.data.normal_())),
    "lora_bias frozen": ({"lora_bias": True}, freeze("lora_B")),
    "trained bias": ({"bias": "lora_only"}, train_biases),
    "adapters in float16": ({}, to(torch.float16, "lora_A", "lora_B")),
    "adapters in bfloat16": ({}, to(torch.bfloat16, "lora_A", "lora_B")),
    "A frozen": ({}, freeze("lora_A")),
    "B frozen": ({}, freeze("lora_B")),
    "inference mode": ({"inference_mode": True}, None),
    "two adapters": (UNSCALED, second_adapter()),
    "two adapters with lora_bias": ({"lora_bias": True}, second_adapter(lora_bias=True)),
    "two adapters, one in bfloat16": ({"target_modules": ["first", "third"]}, in_two_dtypes),
    "the other adapter": ({"target_modules": ["first", "third"]}, second_adapter(active=["other"])),
    "two adapters with dropout, eval": ({"lora_dropout": 0.5}, second_adapter(lora_dropout=0.1)),
    "set_scale": ({}, each(lambda layer: layer.set_scale("default", 0.37))),
    "scale_layer": ({}, each(lambda layer: layer.scale_layer(-1.5))),
    "a hook on a Parameter": ({}, each(lambda layer: layer.lora_A["default"].weight.register_hook(torch.neg))),
}


@pytest.mark.parametrize("case", FUSED)
def test_fused_equals_peft(case, adapted, example, same, calls):
    config, prepare = FUSED[case]
    model = adapted(**{"target_modules": list(LAYERS), **config})
    if prepare is not None:
        prepare(model)
    same(model, example())
    assert calls == {"fused": len(config.get("target_modules", LAYERS))}


@pytest.mark.parametrize("dtype", [*HALF, torch.float64])
def test_bases_of_other_dtypes(dtype, adapted, example, same, calls):
    same(adapted().to(dtype), example(64, dtype))
    assert calls == {"fused": 3}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("prepare", [None, second_adapter()], ids=["one", "two"])
def test_float32_adapters_over_16_bits_are_computed_as_peft_does_under_autocast(
    dtype, prepare, adapted, example, same, calls
):
    model = adapted(target_modules=["first", "third"])
    if prepare is not None:
        prepare(model)
    model.to(dtype)
    to(torch.float32, "lora_A", "lora_B")(model)
    same(model, example(64, dtype), plain_autocast=dtype)
    assert calls == {"fused": 2}


def float16_base(model, size):
    """Return a float16 base under float32 adapters, with A divided and B multiplied by ``size``.

    Values of a small ``size`` are outside the range of float16.
    """
    model.to(torch.float16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    with torch.no_grad():
        for layer in layers(model):
            layer.lora_A["default"].weight.div_(size)
            layer.lora_B["default"].weight.mul_(size)
    return model


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-7])
@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_alpha": 1024}], ids=["lora", "dora", "scaling 256"])
def test_float32_adapters_over_float16_are_as_exact_as_pefts(config, size, adapted, example, same, calls):
    """PEFT computes them in float32: the error of a float16 intermediate would be hundreds of times as large."""
    model = float16_base(adapted(**config), size)
    same(model, example(64, torch.float16), dtype=torch.float16)
    assert calls == {"dora" if "use_dora" in config else "fused": 3}


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_float16_autocast_over_float16_is_no_worse_than_pefts(size, adapted, example, same, calls):
    same(float16_base(adapted(), size), example(64, torch.float16), autocast=torch.float16)
    assert calls == {"fused": 3}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast(dtype, base, adapted, example, same, calls):
    model = adapted(lora_bias=True)
    model.base_model.model.to(base)
    to(torch.float32, "lora_A", "lora_B")(model)
    same(model, example(64, base), autocast=dtype)
    assert calls == {"fused": 3}


class Loud(torch.nn.Linear):
    """nn.Linear with another forward."""

    def forward(self, x):
        return super().forward(x) * 2


class Halved(LoraVariant):
    """A variant derived as PEFT's own are."""

    @staticmethod
    def forward(module, active_adapter, x, result, **kwargs):
        return result + 0.5 * module.lora_B[active_adapter](module.lora_A[active_adapter](x))


def other_base(model):
    base = model.base_model.model.first.base_layer
    base.__class__ = Loud


def hook(name, kind="register_forward_hook"):
    def shift(module, inputs, output=None):
        return tuple(2 * t for t in inputs) if output is None else output + 0.5

    def prepare(model):
        layer = layers(model)[0]
        module = layer.base_layer if name == "base_layer" else getattr(layer, name)["default"]
        getattr(module, kind)((lambda *_: None) if "backward" in kind else shift)

    return prepare


def patch(name):
    def prepare(model):
        module = getattr(layers(model)[0], name)["default"]
        module.forward = functools.partial(_twice, module.__class__.forward, module)

    return prepare


def _twice(forward, module, x):
    return 2 * forward(module, x)


def parametrize(name):
    def prepare(model):
        layer = layers(model)[0]
        module = layer.base_layer if name == "base_layer" else getattr(layer, name)["default"]
        torch.nn.utils.parametrizations.weight_norm(module)
        for parameter in layer.base_layer.parameters():
            parameter.requires_grad_(False)

    return prepare


# LoraConfig's fields, a change of the adapted model, how often the fused path runs, and the reason of the others
PEFTS_OWN = {
    "disabled": ({}, lambda m: m.base_model.disable_adapter_layers(), 0, "its adapters are disabled"),
    "merged": ({}, lambda m: m.merge_adapter(), 0, "its adapters are merged: the base layer alone runs"),
    "none active": (
        {"target_modules": ["first", "second"]}, second_adapter(["other"]), 2, "no adapter of it is active",
    ),
    "trained base": ({}, train_base, 2, "its base weight requires a gradient"),
    "hook on base_layer": ({}, hook("base_layer"), 2, "base_layer has forward hooks"),
    "pre-hook on lora_A": ({}, hook("lora_A", "register_forward_pre_hook"), 2, "lora_A has forward hooks"),
    "hook on lora_B": ({}, hook("lora_B"), 2, "lora_B has forward hooks"),
    "hook on dropout": ({}, hook("lora_dropout"), 2, "lora_dropout has forward hooks"),
    "backward hook": ({}, hook("lora_B", "register_full_backward_hook"), 2, "lora_B has backward hooks"),
    "patched lora_A": ({}, patch("lora_A"), 2, "the forward of lora_A is patched"),
    "patched dropout": ({}, patch("lora_dropout"), 2, "the forward of lora_dropout is patched"),
    "parametrized base": ({}, parametrize("base_layer"), 2, "its base layer is parametrized"),
    "parametrized lora_B": ({}, parametrize("lora_B"), 2, "lora_A is a Linear, lora_B a ParametrizedLinear"),
    "another base": ({}, other_base, 2, "its base layer is a "),
    "DoRA and a plain one": (
        {"use_dora": True, "target_modules": ["first", "third"]}, second_adapter(), 0, "DoRA and another adapter",
    ),
    "variant": ({}, each(lambda layer: layer.lora_variant.update(default=Halved())), 0, "Halved has no fused path"),
}  # fmt: skip


@pytest.mark.parametrize("case", PEFTS_OWN)
def test_pefts_own_forward_runs_where_it_must_and_says_why(case, adapted, example, same, calls):
    config, prepare, fused, why = PEFTS_OWN[case]
    model = adapted(**config)
    if prepare is not None:
        prepare(model)
    same(model, example())
    assert calls.pop("fused", 0) == fused
    assert [reason.startswith(why) for reason in calls] == [True], calls
    ours = accelerate(model, verbose=False)
    reasons = {reason for layer in layers(ours) if hasattr(layer, "lora_A") and (reason := layer.why_not())}
    assert reasons == set(calls)
