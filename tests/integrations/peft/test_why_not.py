"""Tests the conditions of the fused paths one by one; test_linear.py tests their effect on layers."""

import types

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from lora_kernels.integrations.peft.why_not import (
    active_in,
    call_reason,
    input_reason,
    kwargs_reason,
    linear_reason,
    module_reason,
    weight_of,
    weight_reason,
)


class Special(Tensor):
    pass


def hooked(kind):
    module = nn.Linear(2, 2)
    getattr(module, kind)(lambda *_: None)
    return module


def patched(forward):
    module = nn.Linear(2, 2)
    module.forward = forward(module)
    return module


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Linear(2, 2), None),
        (hooked("register_forward_hook"), "it has forward hooks"),
        (hooked("register_forward_pre_hook"), "it has forward hooks"),
        (hooked("register_full_backward_hook"), "it has backward hooks"),
        (hooked("register_full_backward_pre_hook"), "it has backward hooks"),
        (patched(lambda module: lambda x: x), "the forward of it is patched"),
        (patched(lambda module: module.forward), None),
        (patched(lambda module: nn.Linear(2, 2).forward), "the forward of it is patched"),
        (patched(lambda module: types.MethodType(nn.Identity.forward, module)), "the forward of it is patched"),
    ],
)
def test_modules_that_have_to_be_called(module, reason):
    assert module_reason(module, "it") == reason


def test_a_hook_of_accelerate_without_a_patched_forward():
    module = nn.Linear(2, 2)
    module._hf_hook = object()
    assert module_reason(module, "it") == "it has a hook of accelerate"


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (nn.Parameter(torch.ones(2, 2)), None),
        (torch.ones(2, 2, dtype=torch.bfloat16), None),
        (None, "it has no weight"),
        (torch.ones(2, 2).as_subclass(Special), "the weight of it is a Special"),
        (torch.ones(2, 2, dtype=torch.int8), "the weight of it is int8"),
        (torch.ones(2, 2).to(torch.float8_e4m3fn), "the weight of it is float8_e4m3fn"),
        (torch.ones(2, 2, device="meta"), "the weight of it is on the meta device"),
    ],
)
def test_weights_that_cannot_be_read(weight, reason):
    assert weight_reason(weight, "it") == reason


@pytest.mark.parametrize(
    ("x", "autocast", "reason"),
    [
        (torch.float32, False, None),
        (torch.float16, False, "its input is float16, its base weight float32"),
        (torch.float16, True, None),
        (torch.float64, True, "its input is float64, its base weight float32"),
        (torch.int64, True, "its input is int64, its base weight float32"),
    ],
)
def test_inputs_of_other_dtypes(x, autocast, reason):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert input_reason(torch.ones(1, 2, dtype=x), torch.ones(2, 2)) == reason


def test_inputs_of_other_classes():
    assert input_reason(torch.ones(2).as_subclass(Special), torch.ones(2, 2)) == "its input is a Special"
    assert input_reason(nn.Parameter(torch.ones(2)), torch.ones(2, 2)) is None


def test_bases_to_the_letter():
    assert linear_reason(nn.Linear(2, 2)) is None
    assert linear_reason(Conv1D(2, 2)) is None
    assert linear_reason(parametrizations.weight_norm(nn.Linear(2, 2))) == "its base layer is parametrized"
    assert linear_reason(nn.Bilinear(2, 2, 2)) == "its base layer is a torch.nn.modules.linear.Bilinear"


def test_weights_as_sharding_wrappers_leave_them():
    module = nn.Linear(2, 2)
    weight = module.weight
    assert weight_of(module) is weight
    del module._parameters["weight"]
    assert weight_of(module) is None
    module.weight = plain = torch.ones(2, 2)
    assert weight_of(module) is plain


def test_active_adapters_by_name_or_list():
    layer = types.SimpleNamespace(_active_adapter="a")
    assert active_in(layer, {"a": 1}) == ["a"]
    layer._active_adapter = ["b", "missing", "a"]
    assert active_in(layer, {"a": 1, "b": 1}) == ["b", "a"]


def test_calls_that_ask_for_more():
    assert kwargs_reason((), {"adapter_names": ["a"]}).startswith("adapter_names was passed")
    assert kwargs_reason((), {"alora_offsets": [1]}) == "alora_offsets was passed"
    assert kwargs_reason((), {"adapter_names": None, "x": 1}).endswith("than its input: adapter_names, x")
    assert kwargs_reason((1, 2), {}).endswith("than its input: 2 positional")


def test_an_ordinary_call_has_no_reason():
    assert call_reason() is None
    handle = nn.modules.module.register_module_full_backward_hook(lambda *_: None)
    assert call_reason() == "hooks are registered on all modules"
    handle.remove()
    assert call_reason() is None
