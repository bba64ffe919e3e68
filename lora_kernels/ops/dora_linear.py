"""lora_kernels::dora_linear_fwd and _bwd: LoRA's operators with a scale of the output columns.

As in ops/lora_linear.py, the two functions compute directly in eager code and call the operator while a graph is
traced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.lora_linear import _empty_bits, _keep, empty_low_rank, lora_linear_bwd, lora_linear_fwd
from lora_kernels.planning import choose as planner
from lora_kernels.reference import GradMask, unpack_keep
from lora_kernels.reference import dora_linear as reference
from lora_kernels.reference.dora_linear import DoRANeeds, column_dots, dropped, magnitude_scale, scale_columns

_FWD = (
    "dora_linear_fwd(Tensor X, Tensor W, Tensor A, Tensor B, Tensor m, Tensor norm, Tensor? bias, float scaling, "
    "float p, Tensor? seed, str backend, bool keep_z) -> (Tensor Y, Tensor XA, Tensor Z, Tensor keep)"
)
_BWD = (
    "dora_linear_bwd(Tensor dY, Tensor X, Tensor W, Tensor A, Tensor B, Tensor m, Tensor norm, Tensor XA, Tensor? Z, "
    "float scaling, float p, Tensor? seed, Tensor? keep, bool[5] needs, str backend) "
    "-> (Tensor dX, Tensor dA, Tensor dB, Tensor dm, Tensor dbias)"
)

Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def dora_linear_fwd(
    X: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    m: Tensor,
    norm: Tensor,
    bias: Tensor | None,
    scaling: float,
    p: float,
    seed: Tensor | None,
    backend: str,
    keep_z: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Y (M, N), XA (M, r), Z (M, N) and the mask's bits, for the operands of reference.dora_linear_fwd.

    ``backend`` is a resolved name. In float16 without dropout every Triton plan is replaced by the eager one,
    since g is applied between base product and update (reference/dora_linear.py). ``seed`` int64 (2,) enables dropout.
    Z is None unless ``keep_z``. The bits, uint8 (M, ceil(K/8)), exist on Triton with dropout; the reference draws its
    mask again and returns None.
    """
    if torch.compiler.is_compiling():
        return torch.ops.lora_kernels.dora_linear_fwd(X, W, A, B, m, norm, bias, scaling, p, seed, backend, keep_z)
    if backend == "reference" or X.shape[0] == 0:
        keep = _keep(X, p, seed)
        return *reference.dora_linear_fwd(X, W, A, B, m, norm, bias, scaling, keep, p, keep_z), None
    g = magnitude_scale(m, norm)
    if seed is None and X.dtype is torch.float16:
        kernels, chip, Z = planner.triton_kernels(), planner.chip_for(X.device), torch.nn.functional.linear(X, W)
        base = scale_columns(Z, g, bias, None if keep_z else Z)
        Y, XA = kernels.lora_linear_fwd(X, W, A, B * g[:, None], None, scaling, None, "eager", chip, base=base)
        return Y, XA, Z if keep_z else None, None
    if seed is None:
        Z, XA, _ = lora_linear_fwd(X, W, A, B, None, scaling, p, None, backend)
        return scale_columns(Z, g, bias, None if keep_z else Z), XA, Z if keep_z else None, None
    Y, XA, bits = lora_linear_fwd(X, W, A, B * g[:, None], bias, scaling, p, seed, backend, True)
    P = _dropped(X, bits, p) @ W.t()
    return Y.addcmul_(P, g - 1), XA, P if keep_z else None, bits


def _dropped(X: Tensor, bits: Tensor | None, p: float) -> Tensor:
    """D/(1-p) * X for the mask in ``bits``; X itself without bits."""
    return X if bits is None else dropped(X, unpack_keep(bits, X.shape[1]), p)


def dora_linear_bwd(
    dY: Tensor,
    X: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    m: Tensor,
    norm: Tensor,
    XA: Tensor,
    Z: Tensor | None,
    scaling: float,
    p: float,
    seed: Tensor | None,
    keep: Tensor | None,
    needs: DoRANeeds,
    backend: str,
) -> Grads:
    """dX, dA, dB, dm, dbias of dora_linear_fwd for dY (M, N); None for each that ``needs`` excludes."""
    if torch.compiler.is_compiling():
        made = torch.ops.lora_kernels.dora_linear_bwd(
            dY, X, W, A, B, m, norm, XA, Z, scaling, p, seed, keep, list(needs), backend
        )
        dX, dA, dB, dm, dbias = (grad if need else None for grad, need in zip(made, needs, strict=True))
        return dX, dA, dB, dm, dbias
    if backend == "reference" or X.shape[0] == 0:
        return reference.dora_linear_bwd(dY, X, W, A, B, m, norm, XA, Z, scaling, _keep(X, p, seed), p, needs)
    g, dm = magnitude_scale(m, norm), None
    if seed is None and X.dtype is not torch.float16:
        if needs.m and Z is not None:
            dm = column_dots(dY, Z).div_(norm).to(m.dtype)
        inner = GradMask(needs.X, needs.A, needs.B)
        operands = scale_columns(dY, g), X, W, A, B, XA, scaling, p
        dX, dA, dB, _ = lora_linear_bwd(*operands, None, None, inner, backend)
        return dX, dA, dB, dm, dY.sum(0) if needs.bias else None
    inner = GradMask(needs.X, needs.A, needs.B or needs.m, needs.bias)
    gB = B * g[:, None]
    if seed is None:
        kernels, chip = planner.triton_kernels(), planner.chip_for(X.device)
        dZ = scale_columns(dY, g) if needs.X else None
        dX, dA, dgB, dbias = kernels.lora_linear_bwd(dY, X, W, A, gB, XA, scaling, None, inner, "eager", chip, dZ=dZ)
    else:
        dX, dA, dgB, dbias = lora_linear_bwd(dY, X, W, A, gB, XA, scaling, p, seed, keep, inner, backend)
    if needs.m and Z is not None and dgB is not None:
        dm = column_dots(dY, Z).add_((dgB * B).sum(1)).div_(norm).to(m.dtype)
    dB = (dgB * g[:, None]).to(B.dtype) if needs.B and dgB is not None else None
    if dX is not None and seed is not None:
        dX += _dropped(scale_columns(dY, g - 1) @ W, keep, p)
    return dX, dA, dB, dm, dbias


def _fwd_impl(X: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    Y, XA, Z, keep = dora_linear_fwd(X, *args)
    empty = X.new_empty(0, dtype=torch.uint8)  # a schema has no optional outputs
    return Y, XA, X.new_empty(0) if Z is None else Z, empty if keep is None else keep


def _fwd_fake(
    X: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    m: Tensor,
    norm: Tensor,
    bias: Tensor | None,
    scaling: float,
    p: float,
    seed: Tensor | None,
    backend: str,
    keep_z: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    Y = X.new_empty(X.shape[0], B.shape[0])
    keep = X.new_empty(0, dtype=torch.uint8) if seed is None or backend == "reference" else _empty_bits(X)
    return Y, empty_low_rank(X, A.shape[0]), torch.empty_like(Y) if keep_z else X.new_empty(0), keep


def _bwd_impl(dY: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *operands, needs, backend = args
    grads = dora_linear_bwd(*(dY, *operands, DoRANeeds(*needs), backend))
    return tuple(dY.new_empty(0) if grad is None else grad for grad in grads)


def _bwd_fake(
    dY: Tensor,
    X: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    m: Tensor,
    norm: Tensor,
    XA: Tensor,
    Z: Tensor | None,
    scaling: float,
    p: float,
    seed: Tensor | None,
    keep: Tensor | None,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    shaped = ((X, X.shape), (A, A.shape), (B, B.shape), (m, m.shape), (dY, (B.shape[0],)))
    made = (like.new_empty(shape) for like, shape in shaped)
    return tuple(grad if need else dY.new_empty(0) for need, grad in zip(needs, made, strict=True))


_library = torch.library.Library("lora_kernels", "FRAGMENT")
for _schema, _impl, _fake in ((_FWD, _fwd_impl, _fwd_fake), (_BWD, _bwd_impl, _bwd_fake)):
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora_kernels::{_name}", _fake, lib=_library)
