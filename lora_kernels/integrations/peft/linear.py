"""PEFT's LoRA layer over nn.Linear or transformers' Conv1D, with the forward and backward of lora_linear.

    y = x W^T + bias + sum over active adapters of scaling_i * (dropout(x) A_i^T B_i^T + lora_bias_i)

Several adapters are one product: with A = [A_1; A_2; ...] (r, K) and B = [s_1 B_1, s_2 B_2, ...] (N, r) the sum is
x A^T B^T. That needs one x for all, so not several dropout masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn.modules.linear import Identity
from transformers.pytorch_utils import Conv1D

from lora_kernels.autograd.lora_linear import lora_linear_unchecked
from lora_kernels.autograd.lora_linear_stacked import Projection
from lora_kernels.integrations.peft import why_not as conditions
from lora_kernels.integrations.peft.dora import dora_forward, is_dora, why_not_dora
from lora_kernels.integrations.peft.mixed import mixed_forward
from lora_kernels.integrations.peft.why_not import FLOATS, PLAIN
from lora_kernels.operands.dtypes import low_rank_dtype

ROOT = "_lora_root"  # in one layer's __dict__, where PEFT keeps no tuner with the model: see accelerate.Root
CALLS = "_peft_forward_calls"  # in a layer's __dict__: reason -> how many calls PEFT's own forward took
UNCALLED = "_lora_uncalled"  # in the __dict__ of a layer that its owner never calls: the reason
BLOCK = "_lora_block"  # in a layer's __dict__: how the block it is part of runs in training, see mlp.py


class Operands(NamedTuple):
    """What one fused call reads: W (N, K), A (r, K), B (N, r), bias (N,) or None, scaling, dropout's p now, and the
    name of the adapter where dora_linear is to run it."""

    W: Tensor
    A: Tensor
    B: Tensor
    bias: Tensor | None
    scaling: float
    dropout_p: float
    dora: str | None = None


def _base(layer: Linear, x: Tensor | None) -> tuple[Tensor, Tensor | None] | str:
    """W (N, K) and bias (N,) or None of the layer for the input ``x`` (..., K), or a reason."""
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
    """What the fused path reads of the layer in its present state, for the input ``x`` (..., K), or the reason why
    PEFT's own forward runs."""
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
        part = _adapter(layer, name, W.dtype if x is None else x.dtype)
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
        dtype = low_rank_dtype(parts[0][0].dtype)  # the range that scaling * B needs
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


def _adapter(layer: Linear, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, float, float] | str:
    """A (r, K), B (N, r), lora_bias (N,) or None, scaling and dropout's present p of one adapter, or a reason."""
    if name in layer.lora_variant and not is_dora(layer, name):
        return f"{type(layer.lora_variant[name]).__name__} has no fused path"
    modules: Any = layer._modules
    lora_A, lora_B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    dropout = modules["lora_dropout"]._modules[name]
    for module, called in ((lora_A, "lora_A"), (lora_B, "lora_B"), (dropout, "lora_dropout")):
        reason = conditions.module_reason(module, called)
        if reason is not None:
            return reason
    if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear or lora_A._parameters["bias"] is not None:
        return f"lora_A is a {type(lora_A).__name__}, lora_B a {type(lora_B).__name__}; plain are nn.Linear"
    A: Any = conditions.weight_of(lora_A)
    B: Any = conditions.weight_of(lora_B)
    if type(A) not in PLAIN or type(B) not in PLAIN or A.dtype not in FLOATS or B.dtype not in FLOATS or A.is_meta:
        reason = conditions.weight_reason(A, "lora_A") or conditions.weight_reason(B, "lora_B")
        if reason is not None:
            return reason
    if conditions.unsavable(A):
        return conditions.UNSAVABLE
    if A.dtype is not dtype and not getattr(layer, "cast_input_dtype_enabled", True):
        return "casting its input to the adapter's dtype is switched off"
    if type(dropout) is not nn.Dropout and type(dropout) is not Identity:
        return f"its dropout is a {type(dropout).__name__}"
    if type(dropout) is nn.Dropout and dropout.inplace:
        return "its dropout works in place"
    p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    if name in layer.lora_variant:
        reason = why_not_dora(layer, name)
    scaling = conditions.scaling_of(layer, name) if reason is None else reason
    return scaling if isinstance(scaling, str) else (A, B, lora_B._parameters["bias"], scaling, p)


def projection_of(layer: Linear, x: Tensor | None = None) -> tuple[Projection, float] | None:
    """The layer's projection and dropout's p where its fused path holds now (for ``x``, if given), else None."""
    if not isinstance(layer, FusedLinear):
        return None
    found = operands(layer, x)
    return None if isinstance(found, str) or found.dora else (Projection(*found[:5]), found.dropout_p)


def drops(layer: Linear) -> bool:
    """Whether a dropout of the layer is active."""
    return any(isinstance(dropout, nn.Dropout) and dropout.training for dropout in layer.lora_dropout.values())


def count_peft_call(layer: nn.Module, reason: str) -> None:
    """Remember on the layer that a call took PEFT's own forward; nothing is kept under torch.compile."""
    if not torch.compiler.is_compiling():
        calls = layer.__dict__.setdefault(CALLS, {})
        calls[reason] = calls.get(reason, 0) + 1


class Told:
    """What report, explain and print ask of a fused layer; ``operands``: what its fused path reads, or a reason."""

    operands: Callable[[Any], Any]

    def why_not(self) -> str | None:
        """Why the layer takes PEFT's own forward in its present state; None where it is fused."""
        found = vars(self).get(UNCALLED) or self.operands(self)
        return found if isinstance(found, str) else None

    def describe(self) -> tuple[str, str, str, str]:
        """Shape, r, scaling and what runs, as lora_kernels.explain shows them."""
        return described(self, self.why_not())

    def _get_name(self) -> str:
        return type(self).__name__.removeprefix("Fused")

    def extra_repr(self) -> str:
        return "lora_kernels"


class FusedLinear(Told, Linear):
    """peft.tuners.lora.layer.Linear whose forward is lora_linear wherever that computes the same.

    Never built: accelerate changes the class of PEFT's layers, which keep every attribute, parameter and method.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y (..., N) for x (..., K); a call that cannot be fused is PEFT's own, and counted with its reason."""
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
        """y for a batch of several adapters, or the reason why PEFT's own forward runs."""
        names = kwargs.get("adapter_names")
        if args or names is None or len(kwargs) > 1:
            return conditions.kwargs_reason(args, kwargs)
        self._check_forward_args(x, adapter_names=names)
        found = _base(self, x)
        return found if isinstance(found, str) else mixed_forward(self, x, names, *found, _adapter)

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, which calls it on every layer when an adapter was added anywhere: new layers are looked for."""
        super().set_adapter(*args, **kwargs)
        root = self.__dict__.get(ROOT)
        if root is not None:
            root.refresh()

    operands = staticmethod(operands)


def described(layer: Any, reason: str | None) -> tuple[str, str, str, str]:
    """A row of explain for a PEFT layer of any kind: shape, r and scaling of its active adapters, and what runs."""
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
    """A scaling of any type as a short string."""
    try:
        return f"{scaling.detach() if isinstance(scaling, Tensor) else scaling:g}"
    except (TypeError, ValueError, RuntimeError):  # several elements, on the meta device, or not a number
        return type(scaling).__name__
