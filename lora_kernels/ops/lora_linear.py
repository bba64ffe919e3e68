"""lora_kernels::lora_linear_fwd and _bwd: schema, fake implementation, and the call of the planned implementation.

The two functions compute directly in eager code (an operator in Python costs some microseconds a call) and call the
operator while a graph is traced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from lora_kernels import reference
from lora_kernels.operands.dtypes import low_rank_dtype
from lora_kernels.planning import choose as planner
from lora_kernels.reference import GradMask

_FWD = (
    "lora_linear_fwd(Tensor X, Tensor W, Tensor A, Tensor B, Tensor? bias, float scaling, float p, Tensor? seed, "
    "str backend, bool keep_bits) -> (Tensor Y, Tensor XA, Tensor keep)"
)
_BWD = (
    "lora_linear_bwd(Tensor dY, Tensor X, Tensor W, Tensor A, Tensor B, Tensor XA, float scaling, float p, "
    "Tensor? seed, Tensor? keep, bool[4] needs, str backend) -> (Tensor dX, Tensor dA, Tensor dB, Tensor dbias)"
)


def _keep(X: Tensor, p: float, seed: Tensor | None) -> Tensor | None:
    """The reference backend's keep mask: Philox as in the kernels, on a CPU PyTorch's own generator."""
    if seed is None:
        return None
    if X.device.type == "cpu":
        return reference.generator_keep_mask(seed, p, X.shape[0], X.shape[1], X.dtype)
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
    keep_bits: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Y (M, N), XA (M, r) and the mask's bits for X (M, K); ``backend`` is a resolved name.

    ``seed`` int64 (2,) enables dropout. ``keep_bits``: on Triton, return the mask at one bit an element, uint8
    (M, ceil(K/8)), for the backward. The reference always draws it again and returns None.
    """
    if is_compiling():
        return torch.ops.lora_kernels.lora_linear_fwd(X, W, A, B, bias, scaling, p, seed, backend, keep_bits)
    if backend != "reference" and X.shape[0] > 0:
        dropout, (N, r) = seed is not None, B.shape
        _, forced = planner.split_name(backend)
        plan, chip = planner.plan_call(
            "fwd", (X, W), N, X.shape[1], r, dropout, bias is not None, True, keep_bits, forced
        )
        kernels = planner.triton_kernels()
        keep = _empty_bits(X) if keep_bits and seed is not None else None
        drop = None if seed is None else kernels.Dropout(p, seed, keep)
        return *kernels.lora_linear_fwd(X, W, A, B, bias, scaling, drop, plan.name, chip, plan.tiles), keep
    return *reference.lora_linear_fwd(X, W, A, B, bias, scaling, _keep(X, p, seed), p), None


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
    keep: Tensor | None,
    needs: GradMask,
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dX, dA, dB, dbias of lora_linear_fwd for dY (M, N); None for each that ``needs`` excludes.

    ``keep``: the bits that the forward returned, or None to draw the mask again from ``seed``.
    """
    if is_compiling():
        dX, dA, dB, dbias = torch.ops.lora_kernels.lora_linear_bwd(
            dY, X, W, A, B, XA, scaling, p, seed, keep, list(needs), backend
        )
        return dX if needs.X else None, dA if needs.A else None, dB if needs.B else None, dbias if needs.bias else None
    if backend != "reference" and X.shape[0] > 0:
        dropout, (N, r) = seed is not None, B.shape
        _, forced = planner.split_name(backend)
        plan, chip = planner.plan_call(
            "bwd", (dY, W, X), N, X.shape[1], r, dropout, needs.bias, needs.X, keep is not None, forced
        )
        kernels = planner.triton_kernels()
        drop = None if seed is None else kernels.Dropout(p, seed, keep)
        return kernels.lora_linear_bwd(dY, X, W, A, B, XA, scaling, drop, needs, plan.name, chip, plan.tiles)
    return reference.lora_linear_bwd(dY, X, W, A, B, XA, scaling, _keep(X, p, seed), p, needs)


def _fwd_impl(X: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    Y, XA, keep = lora_linear_fwd(X, *args)
    return Y, XA, X.new_empty(0, dtype=torch.uint8) if keep is None else keep  # a schema has no optional outputs


def _empty_bits(X: Tensor) -> Tensor:
    """uint8 (M, ceil(K/8)) in rows of packed_width(K) bytes, for the mask's bits."""
    M, K = X.shape
    return X.new_empty(M, reference.packed_width(K), dtype=torch.uint8)[:, : (K + 7) // 8]


def empty_low_rank(X: Tensor, r: int) -> Tensor:
    """XA (M, r) for X (M, K), uninitialised, in the dtype that every backend uses for it."""
    return X.new_empty(X.shape[0], r, dtype=low_rank_dtype(X.dtype))


def _fwd_fake(
    X: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    scaling: float,
    p: float,
    seed: Tensor | None,
    backend: str,
    keep_bits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = keep_bits and seed is not None and planner.split_name(backend)[0] == "triton"
    keep = _empty_bits(X) if kept else X.new_empty(0, dtype=torch.uint8)
    return X.new_empty(X.shape[0], B.shape[0]), empty_low_rank(X, A.shape[0]), keep


def _bwd_impl(dY: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *operands, needs, backend = args
    grads = lora_linear_bwd(*(dY, *operands, GradMask(*needs), backend))
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
    keep: Tensor | None,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    made = (X.new_empty(X.shape), A.new_empty(A.shape), B.new_empty(B.shape), dY.new_empty(B.shape[0]))
    return tuple(grad if need else dY.new_empty(0) for need, grad in zip(needs, made, strict=True))


_library = torch.library.Library("lora_kernels", "DEF")
for _schema, _impl, _fake in ((_FWD, _fwd_impl, _fwd_fake), (_BWD, _bwd_impl, _bwd_fake)):
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora_kernels::{_name}", _fake, lib=_library)
