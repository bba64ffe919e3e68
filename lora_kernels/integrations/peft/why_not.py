"""Conditions under which PEFT's own forward must run, shared by all fused layers, each with its reason.

The checks run at every call. Each reads an attribute or a dictionary, the cheapest first. PEFT calls base_layer,
lora_A, lora_B and the dropout as modules. A layer that reads their weights instead would skip their hooks and patched
forwards, and what torch does to the call as a whole (tracing, transforms).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.modules import module as any_module
from torch.nn.parameter import Parameter
from transformers.pytorch_utils import Conv1D

from lora_kernels.formats.inference import savable

FLOATS = frozenset((torch.float64, torch.float32, torch.float16, torch.bfloat16))
SCALINGS = FLOATS | {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8}
PLAIN = frozenset((Tensor, Parameter))
LINEAR = (nn.Linear, Conv1D)
UNSAVABLE = "its adapter was created in inference mode, and no backward can save it"

_transforms_active, _tracing_state = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state


def state_reason(layer: LoraLayer) -> str | None:
    """Return why a layer of any kind cannot run fused in its present state (disabled or merged adapters), or None."""
    if layer._disable_adapters:
        return "its adapters are disabled"
    if layer.merged_adapters:
        return "its adapters are merged: the base layer alone runs"
    return None


def unsavable(A: Tensor) -> bool:
    """Return whether autograd cannot save an adapter's weights because they were created in inference mode."""
    return not is_compiling() and A.is_inference() and torch.is_grad_enabled()


def active_in(layer: LoraLayer, held: dict[str, Any]) -> list[str]:
    """Return the layer's active adapters in the order in which PEFT adds them; ``held`` is keyed by adapter."""
    active = layer._active_adapter
    return [name for name in ((active,) if isinstance(active, str) else active) if name in held]


def module_reason(module: nn.Module, name: str) -> str | None:
    """Return why ``module`` must be called instead of reading its weight (hooks, a patched forward), or None."""
    held = module.__dict__
    if held["_forward_hooks"] or held["_forward_pre_hooks"]:
        return f"{name} has forward hooks"
    if held["_backward_hooks"] or held["_backward_pre_hooks"]:
        return f"{name} has backward hooks"
    if "forward" in held:
        patched = held["forward"]  # removed hooks may leave the original forward here
        if getattr(patched, "__func__", None) is not type(module).forward or patched.__self__ is not module:
            return f"the forward of {name} is patched"
    return f"{name} has a hook of accelerate" if "_hf_hook" in held else None


def weight_of(module: nn.Module, name: str = "weight") -> Tensor | None:
    """Return a weight as the module's own forward reads it; sharding wrappers replace a Parameter by a plain tensor."""
    weight = module._parameters.get(name)
    return getattr(module, name, None) if weight is None else weight


def base_weight(module: nn.Module) -> Tensor | None:
    """Return the frozen weight of a base layer, in a form that autograd can save."""
    W = weight_of(module)
    if W is None or is_compiling() or not W.is_inference() or not torch.is_grad_enabled():
        return W
    return savable(W) if type(W) in PLAIN and W.layout is torch.strided and not W.requires_grad else W


def weight_reason(weight: Tensor | None, name: str) -> str | None:
    """Return why the kernels cannot read a weight, or None."""
    if weight is None:
        return f"{name} has no weight"
    if type(weight) not in PLAIN:
        return f"the weight of {name} is a {type(weight).__name__}"
    if weight.dtype not in FLOATS:
        return f"the weight of {name} is {str(weight.dtype).removeprefix('torch.')}"
    if weight.layout is not torch.strided or weight.is_meta or weight.is_nested:
        return storage_reason(weight, f"the weight of {name}")
    return None


def storage_reason(tensor: Tensor, name: str) -> str | None:
    """Return why a tensor is not a dense strided tensor with data, or None."""
    if tensor.is_nested:
        return f"{name} is a nested tensor"
    if tensor.layout is not torch.strided:
        return f"{name} is {str(tensor.layout).removeprefix('torch.').strip('_')}"
    return f"{name} is on the meta device" if tensor.is_meta else None


def scaling_of(layer: LoraLayer, name: str) -> float | str:
    """Return the scaling of an adapter as a finite float, or the reason why it cannot be used as one.

    The reasons are: it requires a gradient, has a shape, or has a type with its own arithmetic. A scaling on a GPU is
    not read, since that would wait for the GPU.
    """
    scaling: Any = layer.scaling[name]
    if type(scaling) is not float:
        if isinstance(scaling, Tensor):
            if type(scaling) not in PLAIN or scaling.dim() != 0:
                return f"its scaling is a {type(scaling).__name__} of shape {tuple(scaling.shape)}"
            if scaling.requires_grad:
                return "its scaling requires a gradient"
            if not scaling.is_cpu or is_compiling():
                return "its scaling is a tensor on a device, or in a graph: its number is not known on the host"
            if scaling.dtype not in SCALINGS:
                return f"its scaling is {str(scaling.dtype).removeprefix('torch.')}"
        elif type(scaling) is not int and not isinstance(scaling, float | np.floating | np.integer):
            return f"its scaling is a {type(scaling).__name__}"
        scaling = float(scaling)
    return scaling if is_compiling() or math.isfinite(scaling) else f"its scaling is {scaling}"


def call_reason() -> str | None:
    """Return why this call, on any layer, needs operations that torch can trace or transform, or None."""
    if is_compiling():
        return "torch.export is tracing it" if torch.compiler.is_exporting() else None
    if any_module._global_forward_hooks or any_module._global_forward_pre_hooks:
        return "hooks are registered on all modules"
    if any_module._global_backward_hooks or any_module._global_backward_pre_hooks:
        return "hooks are registered on all modules"
    if _transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return "torch.jit is tracing it" if _tracing_state() is not None else None


def input_reason(x: Tensor, weight: Tensor) -> str | None:
    """Return why an input does not match a base weight (cases in which lora_linear and nn.Linear differ), or None."""
    if type(x) not in PLAIN:
        return f"its input is a {type(x).__name__}"
    if x.is_nested or x.layout is not torch.strided or x.is_meta:
        return storage_reason(x, "its input")
    if x.ndim == 0:
        return "its input has no dimensions"
    if x.dtype is not weight.dtype:
        float64 = x.dtype is torch.float64 or weight.dtype is torch.float64
        if float64 or not x.is_floating_point() or not torch.is_autocast_enabled(x.device.type):
            given, held = (str(t.dtype).removeprefix("torch.") for t in (x, weight))
            return f"its input is {given}, its base weight {held}"
    return None


def linear_reason(base: nn.Module) -> str | None:
    """Return why a base layer is not exactly nn.Linear or transformers' Conv1D, or None."""
    if type(base) in LINEAR:
        return None
    if nn.utils.parametrize.is_parametrized(base):
        return "its base layer is parametrized"
    return f"its base layer is a {type(base).__module__}.{type(base).__name__}"


def kwargs_reason(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return the reason for a call with more arguments than its input."""
    if kwargs.get("adapter_names") is not None:
        return "adapter_names was passed: a batch of several adapters"
    if kwargs.get("alora_offsets") is not None:
        return "alora_offsets was passed"
    return f"it was called with more than its input: {', '.join(kwargs) or f'{len(args)} positional'}"
