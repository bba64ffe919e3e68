"""Ways to carry out a LoRA linear layer: ours by every plan, and others' algorithms on the same tensors.

Every rival gets the problem's own tensors, dtype and dropout probability, in training mode. The chain and the merge
are written from their published equations; PEFT's layer is PEFT's.
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels import lora_linear
from lora_kernels.planning.choose import OPT_IN, PLANS, triton_missing
from lora_kernels.testing import Problem


class Layer(NamedTuple):
    """Y (M, N) = forward(X (M, K)), or several Y, and the parameters that get gradients, with the gradients' names."""

    forward: Callable[[Tensor], Tensor | tuple[Tensor, ...]]
    params: tuple[Tensor, ...] = ()
    gradients: tuple[str, ...] = ("dA", "dB", "dbias")


@dataclass(frozen=True)
class Implementation:
    """``build(problem, seed)`` makes the layer; ``seed`` fixes the mask of ours and means nothing to a rival.

    ``backend``: that of ours, empty for a rival. ``lora``: False for a frozen layer, which is what others are compared
    with. ``dropout``: whether it can drop at all. ``in_full``: False where the update is rounded to W's precision, so
    that in 16 bits it answers another question.
    """

    name: str
    build: Callable[[Any, Tensor | None], Layer]
    backend: str = ""
    lora: bool = True
    dropout: bool = True
    in_full: bool = True
    compiled: bool = False
    needs: str = ""

    @property
    def ours(self) -> bool:
        return bool(self.backend)

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        return None

    def is_rival(self, dtype: torch.dtype) -> bool:
        """Whether its time counts as the best rival's."""
        return not self.ours and self.lora and (self.in_full or dtype.itemsize > 2)


def _leaf(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The same values, strides kept, as something that gets a gradient."""
    return values.detach().to(dtype or values.dtype).requires_grad_()


def _ours(problem: Problem, seed: Tensor | None, backend: str, adapter_dtype: torch.dtype | None = None) -> Layer:
    A, B = _leaf(problem.A, adapter_dtype), _leaf(problem.B, adapter_dtype)
    bias = None if problem.bias is None else _leaf(problem.bias)

    def forward(X: Tensor) -> Tensor:
        return lora_linear(
            X, problem.W, A, B, bias, scaling=problem.scaling, dropout_p=problem.p, seed=seed, backend=backend
        )

    return Layer(forward, (A, B) if bias is None else (A, B, bias))


def _frozen(problem: Problem, seed: Tensor | None) -> Layer:
    return Layer(lambda X: F.linear(X, problem.W, problem.bias))


def _peft_module(problem: Problem, fp32_adapters: bool) -> tuple[nn.Module, tuple[Tensor, ...]]:
    from peft import LoraConfig, get_peft_model

    (N, K), r = problem.W.shape, problem.A.shape[0]
    base = nn.Linear(K, N, bias=problem.bias is not None, device="meta")
    base.weight = nn.Parameter(problem.W, requires_grad=False)
    if problem.bias is not None:
        base.bias = nn.Parameter(problem.bias, requires_grad=False)
    config = LoraConfig(r=r, lora_alpha=r, lora_dropout=problem.p, target_modules=["proj"])
    holder: Any = nn.Sequential(OrderedDict(proj=base))
    get_peft_model(holder, config, autocast_adapter_dtype=fp32_adapters)
    layer = holder.proj  # PEFT puts its layer in the place of the linear one
    layer.scaling["default"] = problem.scaling
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        A.copy_(problem.A)
        B.copy_(problem.B)
    return layer.train(), (A, B)


def _peft(problem: Problem, seed: Tensor | None, fp32_adapters: bool = False) -> Layer:
    return Layer(*_peft_module(problem, fp32_adapters))


def _peft_compiled(problem: Problem, seed: Tensor | None) -> Layer:
    module, params = _peft_module(problem, fp32_adapters=False)
    torch.compiler.reset()
    return Layer(torch.compile(module, backend="inductor" if problem.X.is_cuda else "eager", dynamic=False), params)


class _AddmmChain(torch.autograd.Function):
    """Y = X W^T, then Y += s (D*X A^T) B^T in place: the small products in the cheap order, the update by addmm_."""

    @staticmethod
    def forward(
        ctx: Any, X: Tensor, W: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, scaling: float, p: float
    ) -> Tensor:
        XD, mask = torch.native_dropout(X, p, True) if p > 0 else (X, None)
        XA = XD @ A.t()
        ctx.save_for_backward(XD, mask, W, A, B, XA)
        ctx.constants = scaling, p
        return F.linear(X, W, bias).addmm_(XA, B.t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        XD, mask, W, A, B, XA = ctx.saved_tensors
        scaling, p = ctx.constants
        dYB = (dY @ B).mul_(scaling)
        dX = dY @ W
        if mask is None:
            dX.addmm_(dYB, A)
        else:
            dX += torch.ops.aten.native_dropout_backward(dYB @ A, mask, 1 / (1 - p))
        return dX, None, dYB.t() @ XD, (dY.t() @ XA).mul_(scaling), None, None, None


class _Merge(torch.autograd.Function):
    """Y = X (W + s B A)^T with the merged weight made anew in each pass; gradients of A and B by small products."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, W: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
        ctx.save_for_backward(X, W, A, B)
        ctx.scaling = scaling
        return F.linear(X, torch.addmm(W, B, A, alpha=scaling), bias)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        X, W, A, B = ctx.saved_tensors
        dX = dY @ torch.addmm(W, B, A, alpha=ctx.scaling)
        dA = (dY @ B).mul_(ctx.scaling).t() @ X
        dB = dY.t() @ (X @ A.t()).mul_(ctx.scaling)
        return dX, None, dA, dB, None, None


def _chain(problem: Problem, seed: Tensor | None) -> Layer:
    A, B = _leaf(problem.A), _leaf(problem.B)
    return Layer(lambda X: _AddmmChain.apply(X, problem.W, A, B, problem.bias, problem.scaling, problem.p), (A, B))


def _merge(problem: Problem, seed: Tensor | None) -> Layer:
    A, B = _leaf(problem.A), _leaf(problem.B)
    return Layer(lambda X: _Merge.apply(X, problem.W, A, B, problem.bias, problem.scaling), (A, B))


TRITON_BACKENDS = ("triton", *(f"triton:{plan}" for plan in PLANS))  # the planner's own choice, then each plan by name
OPT_IN_BACKENDS = tuple(f"triton:{plan}" for plan in OPT_IN)  # plans that run only where they are named
FROZEN = Implementation("frozen linear", _frozen, lora=False)
PEFT = Implementation("peft", _peft, needs="peft")
PEFT_FP32 = Implementation("peft fp32 adapters", partial(_peft, fp32_adapters=True), needs="peft")
PEFT_COMPILED = Implementation("peft torch.compile", _peft_compiled, compiled=True, needs="peft")
ADDMM_CHAIN = Implementation("addmm chain", _chain)
MERGE = Implementation("in-flight merge", _merge, dropout=False, in_full=False)


def ours(backend: str, adapter_dtype: torch.dtype | None = None) -> Implementation:
    """lora_linear by ``backend``, with adapters in the problem's dtype or in another."""
    name = "lora_kernels" if adapter_dtype is None else "lora_kernels fp32 adapters"
    return Implementation(name, partial(_ours, backend=backend, adapter_dtype=adapter_dtype), backend=backend)


def our_backends(device: torch.device) -> tuple[str, ...]:
    """TRITON_BACKENDS where Triton runs in this process, else the reference."""
    return TRITON_BACKENDS if triton_missing(device.type) is None else ("reference",)


def contenders(dtype: torch.dtype, backends: Sequence[str] = TRITON_BACKENDS) -> list[Implementation]:
    """The frozen layer, ours by ``backends``, and the rivals that are quick to build."""
    sixteen_bit = dtype.itemsize == 2
    mine = [ours(backend) for backend in backends] + ([ours(backends[0], torch.float32)] if sixteen_bit else [])
    rivals = [PEFT, *([PEFT_FP32] if sixteen_bit else []), ADDMM_CHAIN, MERGE]
    return [FROZEN, *mine, *rivals]
