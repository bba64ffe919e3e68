"""Runs PEFT's LoRA layer over nn.Linear or transformers' Conv1D by lora_linear, forward and backward.

    y = x W^T + bias + sum over active adapters of scaling_i * (dropout(x) A_i^T B_i^T + lora_bias_i)

Several adapters are one product: with A = [A_1; A_2; ...] (r, K) and B = [s_1 B_1, s_2 B_2, ...] (N, r) the sum is
x A^T B^T. That requires the same dropped x for all adapters, so several of them run fused only without dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_kernels.autograd.lora_linear import lora_linear_unchecked
from lora_kernels.autograd.lora_linear_stacked import Projection
from lora_kernels.integrations.peft import why_not as conditions
from lora_kernels.integrations.peft.adapter import read_adapter
from lora_kernels.integrations.peft.dora import dora_forward
from lora_kernels.integrations.peft.mixed import mixed_forward
from lora_kernels.operands.dtypes import low_rank_dtype

ROOT = "_lora_root"  # in the __dict__ of one layer, if the model holds no tuner of PEFT's: see accelerate.Root
CALLS = "_peft_forward_calls"  # in a layer's __dict__: reason -> number of calls that PEFT's own forward ran
UNCALLED = "_lora_uncalled"  # in the __dict__ of a layer that is never called: the reason
BLOCK = "_lora_block"  # in a layer's __dict__: how its block runs in training, see mlp.py


class Operands(NamedTuple):
    """Operands of one fused call: W (N, K), A (r, K), B (N, r), bias (N,) or None, scaling, the present p of dropout,
    and the adapter's name if dora_linear runs it."""

    W: Tensor
    A: Tensor
    B: Tensor
    bias: Tensor | None
    scaling: float
    dropout_p: float
    dora: str | None = None


def _base(layer: Linear, x: Tensor | None) -> tuple[Tensor, Tensor | None] | str:
    """Return W (N, K) and bias (N,) or None for the input ``x`` (..., K), or the reason for PEFT's own forward."""
    reason = conditions.state_reason(layer)
    if reason is not None:
        return reason
    base: Any = layer._modules["base_layer"]
    reason = conditions.linear_reason(base) or conditions.module_reason(base, "base_layer")
    if reason is not None:
        return reason
    W = conditions.base_weight(base)
    reason = conditions.weight_reason(W, "base_layer")
    if reason is not None:
        return reason
    assert W is not None
    if W.requires_grad:
        if torch.is_grad_enabled() or layer.lora_variant:
            return "its base weight requires a gradient"
        W = W.detach()
    if x is not None:
        reason = conditions.input_reason(x, W) or conditions.call_reason()
        if reason is not None:
            return reason
    if type(base) is Conv1D:
        W = W.t()
    return W, base._parameters["bias"] if "bias" in base._parameters else conditions.weight_of(base, "bias")


def operands(layer: Linear, x: Tensor | None = None) -> Operands | str:
    """Return the operands of the layer in its present state for the input ``x`` (..., K), or the reason why PEFT's own
    forward runs."""
    found = _base(layer, x)
    if isinstance(found, str):
        return found
    W, bias = found
    held: Any = layer._modules["lora_A"]
    names = conditions.active_in(layer, held._modules)
    if not names:
        return "no adapter of it is active"
    parts = []
    for name in names:
        part = read_adapter(layer, name, W.dtype if x is None else x.dtype)
        if isinstance(part, str):
            return part
        parts.append(part)
    if len(parts) == 1:
        A, B, lora_bias, scaling, dropout_p = parts[0]
        if layer.lora_variant and names[0] in layer.lora_variant:
            if x is not None and x.dim() == 1:
                return "DoRA of a vector: PEFT makes a row of it"
            return Operands(W, A, B, bias, scaling, dropout_p, names[0])
    elif any(p > 0.0 for *_, p in parts):
        return "several adapters are active with a dropout each"
    else:
        dtype = low_rank_dtype(parts[0][0].dtype)  # scaling * B may exceed the range of float16
        A = torch.cat([a.to(dtype) for a, *_ in parts])
        B = torch.cat([b.to(dtype) * scaling for _, b, _, scaling, _ in parts], 1)
        lora_biases = [b * scaling for _, _, b, scaling, _ in parts if b is not None]
        lora_bias = sum(lora_biases[1:], lora_biases[0]) if lora_biases else None
        scaling, dropout_p = 1.0, 0.0
    if lora_bias is not None:
        lora_bias = lora_bias * scaling
        bias = lora_bias if bias is None else bias + lora_bias
        if not torch.is_autocast_enabled(W.device.type):
            bias = bias.to(W.dtype)
    return Operands(W, A, B, bias, scaling, dropout_p)


def projection_of(layer: Linear, x: Tensor | None = None) -> tuple[Projection, float] | None:
    """Return the layer's projection and dropout's p if it can run fused now (for ``x``, if given), else None."""
    if not isinstance(layer, FusedLinear):
        return None
    found = operands(layer, x)
    return None if isinstance(found, str) or found.dora else (Projection(*found[:5]), found.dropout_p)


def drops(layer: Linear) -> bool:
    """Return whether a dropout of the layer is active."""
    return any(isinstance(dropout, nn.Dropout) and dropout.training for dropout in layer.lora_dropout.values())


def count_peft_call(layer: nn.Module, reason: str) -> None:
    """Count on the layer a call that PEFT's own forward runs. Under torch.compile nothing is counted."""
    if not torch.compiler.is_compiling():
        calls = layer.__dict__.setdefault(CALLS, {})
        calls[reason] = calls.get(reason, 0) + 1


class ExplainMixin:
    """Add to a fused layer the methods that report, explain and print call.

    ``operands(layer)``: the operands of a fused call, or the reason why PEFT's own forward runs.
    """

    operands: Callable[[Any], Any]

    def why_not(self) -> str | None:
        """Return why PEFT's own forward runs in the layer's present state; None if it runs fused."""
        found = vars(self).get(UNCALLED) or self.operands(self)
        return found if isinstance(found, str) else None

    def describe(self) -> tuple[str, str, str, str]:
        """Return shape, r, scaling and what runs, as lora_kernels.explain shows them."""
        return described(self, self.why_not())

    def _get_name(self) -> str:
        return type(self).__name__.removeprefix("Fused").removeprefix("Fast")

    def extra_repr(self) -> str:
        return "lora_kernels"


class FusedLinear(ExplainMixin, Linear):
    """peft.tuners.lora.layer.Linear with lora_linear as its forward, in all states where both compute the same.

    It is never built: accelerate assigns this class to PEFT's layers, which keep every attribute, parameter and method.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return y (..., N) for x (..., K). PEFT's forward runs a call that cannot be fused; its reason is counted."""
        if args or kwargs:
            y = self._mixed(x, *args, **kwargs)
            if not isinstance(y, str):
                return y
            reason = y
        else:
            group = self.__dict__.get("_lora_group")
            if group is not None:
                y = group.take(self, x)
                if y is not None:
                    return y
            found = operands(self, x)
            if not isinstance(found, str):
                W, A, B, bias, scaling, p, dora = found
                if dora is not None:
                    return dora_forward(self, dora, x)
                return lora_linear_unchecked(x, W, A, B, bias, scaling, p, None, "auto", True)
            reason = found
        count_peft_call(self, reason)
        return super().forward(x, *args, **kwargs)

    def _mixed(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | str:
        """Return y for a batch of several adapters, or the reason why PEFT's own forward runs."""
        names = kwargs.get("adapter_names")
        if args or names is None or len(kwargs) > 1:
            return conditions.kwargs_reason(args, kwargs)
        self._check_forward_args(x, adapter_names=names)
        found = _base(self, x)
        return found if isinstance(found, str) else mixed_forward(self, x, names, *found)

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Call PEFT's, then fuse new layers: PEFT calls this on every layer after it added an adapter to the model."""
        super().set_adapter(*args, **kwargs)
        root = self.__dict__.get(ROOT)
        if root is not None:
            root.refresh()

    operands = staticmethod(operands)


def described(layer: Any, reason: str | None) -> tuple[str, str, str, str]:
    """Return explain's row for a PEFT layer of any kind: shape, r and scaling of its active adapters, and what runs."""
    sizes = [getattr(layer, name, None) for name in ("out_features", "in_features")]
    names = [name for name in layer.active_adapters if name in layer.r]
    runs = "fused" if reason is None else f"PEFT's own forward: {reason}"
    if reason is None and BLOCK in layer.__dict__:
        runs += f"; in training {layer.__dict__[BLOCK]}"
    calls: dict[str, int] = layer.__dict__.get(CALLS, {})
    if reason is None and calls:
        runs += "; PEFT's own forward took " + ", ".join(f"{n} calls ({why})" for why, n in calls.items())
    r, scaling = [str(layer.r[name]) for name in names], [_shown(layer.scaling[name]) for name in names]
    return "-" if None in sizes else "x".join(map(str, sizes)), "+".join(r) or "-", "+".join(scaling) or "-", runs


def _shown(scaling: Any) -> str:
    """Return a scaling of any type as a short string."""
    try:
        return f"{scaling.detach() if isinstance(scaling, Tensor) else scaling:g}"
    except (TypeError, ValueError, RuntimeError):  # several elements, on the meta device, or not a number
        return type(scaling).__name__
