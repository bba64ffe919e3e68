"""lora_kernels::multi_lora_linear_fwd and _bwd: schema, fake implementation, call of the planned implementation.

As in ops/lora_linear.py, the functions compute directly in eager code and call the operator while a graph is traced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from lora_kernels import reference
from lora_kernels.operands.dtypes import low_rank_dtype
from lora_kernels.operands.slots import Slots
from lora_kernels.planning import multi_plan
from lora_kernels.reference import GradMask
from lora_kernels.reference.products import linear

ON_CPU = ("reference", "auto", "cpp")  # results of multi_plan.resolve for which no GPU kernel runs
_SLOTS = "Tensor A, Tensor B, Tensor starts, Tensor ranks, Tensor scalings, int max_rank, Tensor ids"
_FWD = (
    f"multi_lora_linear_fwd(Tensor X, Tensor W, {_SLOTS}, Tensor? bias, bool need_xa, str backend) "
    "-> (Tensor Y, Tensor XA)"
)
_BWD = (
    f"multi_lora_linear_bwd(Tensor dY, Tensor X, Tensor W, {_SLOTS}, Tensor XA, bool[4] needs, str backend) "
    "-> (Tensor dX, Tensor dA, Tensor dB, Tensor dbias)"
)


def multi_lora_linear_fwd(
    X: Tensor, W: Tensor, slots: Slots, ids: Tensor, bias: Tensor | None, need_xa: bool, backend: str
) -> tuple[Tensor, Tensor | None]:
    """Y (M, N) and, if ``need_xa``, XA (M, max_rank) for X (M, K), ids int32 (M,); ``backend`` is resolved."""
    if is_compiling():
        return torch.ops.lora_kernels.multi_lora_linear_fwd(X, W, *slots, ids, bias, need_xa, backend)
    if backend in ON_CPU:
        if multi_plan.by_cpp(X, slots, need_xa, backend):
            Y = linear(X, W, bias)
            return multi_plan.cuda_kernels().multi_lora_update_(Y, X, slots, ids), None
    elif X.shape[0] > 0:
        plan, chip = multi_plan.plan_call("fwd", X, W, slots, need_xa, backend)
        if plan.name == "cuda":
            return multi_plan.cuda_kernels().multi_lora_decode(X, W, slots, ids, bias), None
        kernels = multi_plan.triton_kernels()
        return kernels.multi_lora_linear_fwd(X, W, slots, ids, bias, plan.name, chip, plan.tiles)
    if need_xa:
        return reference.multi_lora_linear_fwd(X, W, slots, ids, bias)
    return reference.multi_lora_linear_infer(X, W, slots, ids, bias), None


def multi_lora_linear_bwd(
    dY: Tensor, X: Tensor, W: Tensor, slots: Slots, ids: Tensor, XA: Tensor, needs: GradMask, backend: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dX, dA, dB, dbias of multi_lora_linear_fwd for dY (M, N); None for each that ``needs`` excludes."""
    if is_compiling():
        grads = torch.ops.lora_kernels.multi_lora_linear_bwd(dY, X, W, *slots, ids, XA, list(needs), backend)
        return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))  # type: ignore[return-value]
    if backend not in ON_CPU and X.shape[0] > 0:
        plan, chip = multi_plan.plan_call("bwd", X, W, slots, True, backend, needs.X)
        kernels = multi_plan.triton_kernels()
        return kernels.multi_lora_linear_bwd(dY, X, W, slots, ids, XA, needs, plan.name, chip)
    return reference.multi_lora_linear_bwd(dY, X, W, slots, ids, XA, needs)


def _fwd_impl(X: Tensor, W: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    slots, (ids, bias, need_xa, backend) = Slots(*args[:6]), args[6:]
    Y, XA = multi_lora_linear_fwd(X, W, slots, ids, bias, need_xa, backend)
    return Y, X.new_empty(0) if XA is None else XA  # a schema has no optional outputs


def _fwd_fake(X: Tensor, W: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    max_rank, need_xa = args[5], args[8]
    XA = X.new_empty(X.shape[0], max_rank, dtype=low_rank_dtype(X.dtype)) if need_xa else X.new_empty(0)
    return X.new_empty(X.shape[0], W.shape[0]), XA


def _bwd_impl(dY: Tensor, X: Tensor, W: Tensor, *args: Any) -> tuple[Tensor, ...]:
    slots, (ids, XA, needs, backend) = Slots(*args[:6]), args[6:]
    grads = multi_lora_linear_bwd(dY, X, W, slots, ids, XA, GradMask(*needs), backend)
    return tuple(dY.new_empty(0) if grad is None else grad for grad in grads)


def _bwd_fake(dY: Tensor, X: Tensor, W: Tensor, *args: Any) -> tuple[Tensor, ...]:
    A, B, needs = args[0], args[1], args[8]
    made = (X.new_empty(X.shape), A.new_empty(A.shape), B.new_empty(B.shape), dY.new_empty(W.shape[0]))
    return tuple(grad if need else dY.new_empty(0) for need, grad in zip(needs, made, strict=True))


_library = torch.library.Library("lora_kernels", "FRAGMENT")
for _schema, _impl, _fake in ((_FWD, _fwd_impl, _fwd_fake), (_BWD, _bwd_impl, _bwd_fake)):
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora_kernels::{_name}", _fake, lib=_library)
