"""lora_kernels::lora_linear_fwd and _bwd: schema, shapes without data, and the call of the planned implementation.

Eager code calls the two functions below directly (a Python-implemented operator costs some microseconds a call);
a compiled graph calls them through torch.ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels import plan as planner
from lora_kernels import reference
from lora_kernels.plan import Problem
from lora_kernels.reference import Needs

_FWD = (
    "lora_linear_fwd(Tensor X, Tensor W, Tensor A, Tensor B, Tensor? bias, float scaling, float p, Tensor? seed, "
    "str backend) -> (Tensor Y, Tensor XA)"
)
_BWD = (
    "lora_linear_bwd(Tensor dY, Tensor X, Tensor W, Tensor A, Tensor B, Tensor XA, float scaling, float p, "
    "Tensor? seed, bool[4] needs, str backend) -> (Tensor dX, Tensor dA, Tensor dB, Tensor dbias)"
)


def _keep(X: Tensor, p: float, seed: Tensor | None) -> Tensor | None:
    """The reference backend's keep mask: Philox as in the kernels, on a CPU PyTorch's own generator."""
    if seed is None:
        return None
    if X.device.type == "cpu":
        return reference.generator_keep_mask(seed, p, X.shape[0], X.shape[1])
    return reference.philox_keep_mask(seed, p, X.shape[0], X.shape[1])


def lora_linear_fwd(
    X: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    scaling: float,
    p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Y (M, N) and XA (M, r) for X (M, K); ``seed`` int64 (2,) switches dropout on; ``backend`` is a resolved name."""
    kind, forced = planner.split_name(backend)
    if kind == "triton" and X.shape[0] > 0:
        (M, K), (N, r) = X.shape, B.shape
        problem = Problem("fwd", M, N, K, r, X.dtype, dropout=seed is not None, bias=bias is not None)
        chip = planner.chip_for(X.device)
        plan = planner.choose(problem, chip, forced)
        return planner.triton_kernels().lora_linear_fwd(X, W, A, B, bias, scaling, p, seed, plan.name, chip)
    return reference.lora_linear_fwd(X, W, A, B, bias, scaling, _keep(X, p, seed), p)


def lora_linear_bwd(
    dY: Tensor,
    X: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    XA: Tensor,
    scaling: float,
    p: float,
    seed: Tensor | None,
    needs: Needs,
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dX, dA, dB, dbias of lora_linear_fwd for dY (M, N); None for each that ``needs`` leaves out."""
    kind, forced = planner.split_name(backend)
    if kind == "triton" and X.shape[0] > 0:
        (M, K), (N, r) = X.shape, B.shape
        problem = Problem("bwd", M, N, K, r, X.dtype, seed is not None, needs.bias, need_dx=needs.X)
        chip = planner.chip_for(X.device)
        plan = planner.choose(problem, chip, forced)
        kernels = planner.triton_kernels()
        return kernels.lora_linear_bwd(dY, X, W, A, B, XA, scaling, p, seed, needs, plan.name, chip)
    return reference.lora_linear_bwd(dY, X, W, A, B, XA, scaling, _keep(X, p, seed), p, needs)


def _fwd_fake(X: Tensor, W: Tensor, A: Tensor, B: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return X.new_empty(X.shape[0], B.shape[0]), X.new_empty(X.shape[0], A.shape[0])


def _bwd_impl(dY: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *operands, needs, backend = args
    grads = lora_linear_bwd(*(dY, *operands, Needs(*needs), backend))
    return tuple(dY.new_empty(0) if grad is None else grad for grad in grads)


def _bwd_fake(
    dY: Tensor,
    X: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    XA: Tensor,
    scaling: float,
    p: float,
    seed: Tensor | None,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    made = (X.new_empty(X.shape), A.new_empty(A.shape), B.new_empty(B.shape), dY.new_empty(B.shape[0]))
    return tuple(grad if need else dY.new_empty(0) for need, grad in zip(needs, made, strict=True))


_library = torch.library.Library("lora_kernels", "DEF")
for _schema, _impl, _fake in ((_FWD, lora_linear_fwd, _fwd_fake), (_BWD, _bwd_impl, _bwd_fake)):
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora_kernels::{_name}", _fake, lib=_library)
