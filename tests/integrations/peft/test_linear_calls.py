"""Tests calls of FusedLinear: tracers and transforms, shapes, errors, dropout, checkpointing, and what it reports."""

import copy
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lora_kernels.integrations.peft import accelerate
from lora_kernels.integrations.peft.linear import FusedLinear, operands, projection_of
from lora_kernels.reference import generator_keep_mask
from lora_kernels.testing import assert_close
from tests.integrations.peft.changes import layers, second_adapter, train_base


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
    shown = "fused; PEFT's own forward took 1 calls (no adapter of the batch is on it)"
    assert first.describe()[3] == shown
