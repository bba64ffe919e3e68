"""FusedLinear against PEFT's own forward: numbers by the error rule, and which of the two ran."""

import copy
import functools
import sys

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraVariant
from torch.utils.checkpoint import checkpoint

from lora_kernels.check.compat.families import fill_adapters
from lora_kernels.integrations.peft import accelerate
from lora_kernels.integrations.peft.linear import FusedLinear, operands, projection_of
from lora_kernels.reference import generator_keep_mask
from lora_kernels.testing import assert_close

LAYERS = ("first", "second", "third")
HALF = (torch.float16, torch.bfloat16)
UNSCALED = {"rank_pattern": {"first": 7, "third": 1}, "alpha_pattern": {"second": 3}}


def layers(model):
    return [getattr(model.base_model.model, name) for name in LAYERS]


def each(change):
    return lambda model: [change(layer) for layer in layers(model) if hasattr(layer, "lora_A")]


def second_adapter(active=("default", "other"), r=3, **config):
    def prepare(model):
        model.add_adapter("other", LoraConfig(r=r, lora_alpha=5, target_modules=["first", "third"], **config))
        fill_adapters(model, seed=3)
        model.base_model.set_adapter(list(active))
        model.eval()

    return prepare


def to(dtype, *names):
    return each(lambda layer: [getattr(layer, name).to(dtype) for name in names])


def freeze(name):
    return each(lambda layer: getattr(layer, name).requires_grad_(False))


def train_biases(model):
    for layer in layers(model):
        if layer.base_layer.bias is not None:
            layer.base_layer.bias.requires_grad_(True)


def in_two_dtypes(model):
    to(torch.bfloat16, "lora_A", "lora_B")(model)
    second_adapter()(model)


# what is set up before the comparison: LoraConfig's fields, and a change of the adapted model
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
    """A float16 base under float32 adapters, with ``size`` of their A moved to B: beyond float16 where it is small."""
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
    """Which computes them in float32: the error of a float16 intermediate would be hundreds of times as large."""
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
    """A variant as PEFT's own are made."""

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


def train_base(model):
    model.base_model.model.first.base_layer.weight.requires_grad_(True)


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
    told = {reason for layer in layers(ours) if hasattr(layer, "lora_A") and (reason := layer.why_not())}
    assert told == set(calls)


def test_dora_runs_fused(adapted, example, same, calls):
    same(adapted(use_dora=True), example())
    assert calls == {"dora": 3}


def test_a_base_that_trains_is_fused_without_gradients(adapted, example, run, calls):
    model = accelerate(adapted(), verbose=False)
    train_base(model)
    with torch.no_grad():
        run(model, example())
    assert calls == {"fused": 3}


def test_unknown_arguments_are_pefts(adapted, example, calls):
    model = adapted(target_modules=["first", "third"])
    with pytest.raises(TypeError, match="louder"):
        accelerate(model, verbose=False).base_model.model.first(example(), louder=True)
    assert calls == {"it was called with more than its input: louder": 1}


@pytest.mark.parametrize("kind", ["every", "functional", "jvp", "jit", "export", "strict export"])
def test_transforms_and_tracers_see_pefts_operations(kind, adapted, example, run, calls):
    plain, x = adapted(), example().detach()
    model = accelerate(copy.deepcopy(plain), verbose=False)
    with torch.no_grad():
        y = plain(x)
        if kind == "every":
            handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
            got = model(x)
            handle.remove()
        elif kind == "functional":
            got = torch.func.vmap(model)(x)
        elif kind == "jvp":
            got, _ = torch.func.jvp(model, (x,), (x,))
        elif kind == "jit":
            got = torch.jit.trace(model, x, check_trace=False)(x)
        else:
            program = torch.export.export(model, (x,), strict=kind == "strict export")
            assert "lora_kernels" not in str(program.graph)
            got = program.module()(x)
    torch.testing.assert_close(got, y)
    assert "fused" not in calls


def test_forward_mode_differentiation(adapted, example, calls):
    plain, x = adapted(), example().detach()
    model = accelerate(copy.deepcopy(plain), verbose=False)
    with torch.autograd.forward_ad.dual_level():
        tangents = [
            torch.autograd.forward_ad.unpack_dual(m(torch.autograd.forward_ad.make_dual(x, x))).tangent
            for m in (plain, model)
        ]
    torch.testing.assert_close(*tangents)
    assert calls == {"forward-mode differentiation is active": 3}


@pytest.mark.parametrize("x", [torch.ones(12), torch.ones(0, 12), torch.ones(2, 3, 5, 12), torch.ones(12, 7).t()])
def test_inputs_of_any_shape(x, adapted, run, calls):
    plain = adapted()
    got, want = run(accelerate(copy.deepcopy(plain), verbose=False), x), run(plain, x)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=name)
    assert calls == {"fused": 3}


def test_errors_stay_errors(adapted, example):
    model = accelerate(adapted(), verbose=False)
    with pytest.raises((ValueError, RuntimeError), match=r"12|shapes"):
        model(torch.ones(2, 11))
    with pytest.raises(RuntimeError, match="dtype"):
        model(example(dtype=torch.bfloat16))


def test_dropout_drops_the_adapters_input_and_is_the_same_in_backward(adapted, example, run, monkeypatch, calls):
    seed = torch.tensor([5, 0])
    monkeypatch.setattr(sys.modules["lora_kernels.autograd.lora_linear"], "dropout_seed", lambda *_: seed)
    model = adapted(lora_dropout=0.4, target_modules=["first"]).train()
    got = run(accelerate(copy.deepcopy(model), verbose=False), example())
    keep = generator_keep_mask(seed, 0.4, 16, 12)
    assert 0.4 < keep.mean() < 0.8

    class Kept(torch.nn.Module):
        def forward(self, x):
            return x * keep.to(x.dtype) / 0.6

    model.base_model.model.first.lora_dropout["default"] = Kept()
    plain, truth = run(model, example()), run(copy.deepcopy(model).double(), example(dtype=torch.float64))
    for name, value in plain.items():
        assert_close(got[name], value, truth[name], what=name)
    assert calls == {"fused": 1}


def test_dropout_of_its_own_mode_and_of_several_adapters(adapted, example, run, calls):
    model = adapted(lora_dropout=0.4, target_modules=["first", "third"])
    accelerate(model, verbose=False)
    first, third = layers(model)[0], layers(model)[2]
    assert [operands(first).dropout_p, operands(third).dropout_p] == [0.0, 0.0]
    first.lora_dropout.train()
    assert [operands(first).dropout_p, operands(third).dropout_p] == [0.4, 0.0]
    second_adapter()(model.train())
    assert operands(first).dropout_p == 0.0
    model.train()
    run(model, example())
    assert calls == {"several adapters are active with a dropout each": 2}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_masks(reentrant, adapted, example, run):
    model = accelerate(adapted(lora_dropout=0.3), verbose=False).train()

    class Checkpointed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    torch.manual_seed(3)
    want = run(model, example())
    torch.manual_seed(3)
    got = run(Checkpointed(), example())
    assert [*got] == [name.replace("d base", "d inner.base") for name in want]
    assert all(torch.equal(*pair) for pair in zip(got.values(), want.values(), strict=True))


def test_gradients_accumulate(adapted, example, run):
    model = accelerate(adapted(), verbose=False)
    once = run(model, example())["d base_model.model.first.lora_A.default.weight"].clone()
    model(example()).sum().backward()
    twice = model.base_model.model.first.lora_A["default"].weight.grad
    model.zero_grad()
    model(example()).sum().backward()
    torch.testing.assert_close(twice, once + model.base_model.model.first.lora_A["default"].weight.grad)


def test_projection_is_there_where_the_fused_path_holds(adapted, example):
    model = adapted()
    first = layers(model)[0]
    assert projection_of(first) is None
    accelerate(model, verbose=False)
    projection, p = projection_of(first, example())
    assert (projection.W is first.base_layer.weight, projection.scaling, p) == (True, 2.0, 0.0)
    assert projection_of(first, example(dtype=torch.float16)) is None
    model.merge_adapter()
    assert projection_of(first) is None


def test_counts_calls_that_were_not_fused_and_looks_like_pefts(adapted, example):
    model = accelerate(adapted(), verbose=False)
    first = layers(model)[0]
    assert isinstance(first, FusedLinear)
    assert repr(first).startswith("lora.Linear(\n  lora_kernels\n  (base_layer)")
    assert first.describe() == ("40x12", "4", "2", "fused")
    model(example(2).detach(), adapter_names=["__base__", "__base__"])
    told = "fused; PEFT's own forward took 1 calls (no adapter of the batch is on it)"
    assert first.describe()[3] == told
