"""Launch sequences and tiles of the plans of a LoRA linear layer. Importing this module imports Triton.

    XA  = s/(1-p) (D*X) A^T        Y  = X W^T + bias + XA B^T
    dYB = s dY B                   dX = dY W + D/(1-p) * (dYB A)       dA = dYB^T (D*X) / (1-p)       dB = dY^T XA

eager computes the base product by the vendor's library and adds the update; no other plan may be slower. The
library also computes the products of rank r if there is no mask and all operands share a dtype (library_low_rank).
planning/plans.py has the launches of each plan as data, planning/choose.py chooses among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.kernels.chip import Chip
from lora_kernels.kernels.common import Dropout
from lora_kernels.kernels.hopper.gluon import gluon_extend, gluon_one_launch
from lora_kernels.kernels.hopper.gluon_bwd import gluon_dx
from lora_kernels.kernels.hopper.gluon_tiles import gluon_config
from lora_kernels.kernels.hopper.tma import one_launch, tma_extend
from lora_kernels.kernels.hopper.tma_bwd import tma_dx
from lora_kernels.kernels.linear.expand import add_update_, expand_add_, library_low_rank
from lora_kernels.kernels.linear.lora_linear import extend, one_pass
from lora_kernels.kernels.linear.lora_linear_bwd import da, dx_da, dyb_db
from lora_kernels.kernels.linear.one_launch import ptr_one_launch
from lora_kernels.kernels.linear.shrink import shrink
from lora_kernels.kernels.mlp.lora_mlp import lora_mlp_bwd
from lora_kernels.kernels.mlp.swiglu import swiglu
from lora_kernels.kernels.stacked.launchers import lora_linear_stacked_bwd, lora_linear_stacked_fwd
from lora_kernels.kernels.tiles import (
    expand_config,
    gemm_config,
    one_pass_config,
    ptr_one_launch_config,
    rank_block,
    shrink_config,
    split_config,
    tma_config,
    tma_dx_config,
    wide_loads,
)
from lora_kernels.operands.dtypes import low_rank_dtype

# Plans whose main product is a persistent kernel: that kernel, and the function that chooses its tiles.
ONE_LAUNCH: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Any]]] = {
    "one_launch": (one_launch, lambda M, N, r, dtype, chip, wide: tma_config(M, N, r, dtype, chip)),
    "gluon_one_launch": (gluon_one_launch, lambda M, N, r, dtype, chip, wide: gluon_config(M, N, r, dtype, chip)),
    "ptr_one_launch": (ptr_one_launch, ptr_one_launch_config),
}
EXTEND: dict[str, tuple[Callable[..., Tensor], Callable[..., Any]]] = {
    "tma_extend": (tma_extend, tma_config),
    "gluon_extend": (gluon_extend, gluon_config),
}
DX: dict[str, tuple[Callable[..., tuple[Tensor, Tensor | None]], Callable[..., Any]]] = {
    "tma_extend": (tma_dx, tma_dx_config),
    "gluon_extend": (gluon_dx, gluon_config),
}
__all__ = [
    "Dropout",
    "lora_linear_bwd",
    "lora_linear_fwd",
    "lora_linear_stacked_bwd",
    "lora_linear_stacked_fwd",
    "lora_mlp_bwd",
    "swiglu",
]


def lora_linear_fwd(
    X: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    scaling: float,
    drop: Dropout | None,
    plan: str,
    chip: Chip,
    tiles: Any = None,
    base: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Y (M, N) and XA (M, r) by ``plan``; M > 0. Fills ``drop.bits`` if they exist.

    ``tiles``: the configuration of the plan's main product; None uses the default of tiles.py. ``base`` (M, N), in the
    eager plan: used in place of X W^T + bias and overwritten with Y.
    """
    M, (N, r), dtype = X.shape[0], B.shape, X.dtype
    wide = wide_loads(X, W)
    if plan in ONE_LAUNCH:
        assert drop is None, f"{plan} draws no mask"
        whole, choose = ONE_LAUNCH[plan]
        return whole(X, W, A, B, bias, scaling, tiles or choose(M, N, r, dtype, chip, wide), chip.units)
    if plan == "one_pass":
        tiles = tiles or one_pass_config(M, dtype, chip, drop is not None, wide)
        return one_pass(X, W, A, B, bias, scaling, drop, tiles)
    if plan == "eager" and library_low_rank(dtype, drop):
        XA = torch.addmm(X.new_empty(M, r), X, A.to(dtype).t(), beta=0, alpha=scaling)
    else:
        XA = shrink(X, A, scaling, drop, shrink_config(M, dtype, chip, r, drop is not None, wide))
    if plan == "eager":
        Y = torch.nn.functional.linear(X, W, bias) if base is None else base
        return (Y.addmm_(XA, B.to(dtype).t()) if XA.dtype is dtype else add_update_(Y, XA, B, chip)), XA
    if plan in EXTEND:
        kernel, choose = EXTEND[plan]
        return kernel(X, W, XA, B, bias, tiles or choose(M, N, r, dtype, chip), chip.units), XA
    assert plan == "shrink_extend", f"no plan {plan!r}"
    return extend(X, W, XA, B, bias, tiles or gemm_config(M, N, dtype, chip, wide)), XA


def lora_linear_bwd(
    dY: Tensor,
    X: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    XA: Tensor,
    scaling: float,
    drop: Dropout | None,
    needs: Sequence[bool],
    plan: str,
    chip: Chip,
    tiles: Any = None,
    dZ: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dX, dA, dB, dbias by ``plan``; None for each that ``needs`` (X, A, B, bias) excludes; M > 0.

    ``dZ`` (M, N), in the eager plan: the gradient of the base product, if it differs from dY.
    """
    need_x, need_a, need_b, need_bias = needs
    if plan == "eager":
        return _eager_bwd(dY, X, W, A, B, XA, scaling, drop, needs, chip, dZ)
    assert plan == "shrink_extend" or plan in DX, f"no plan {plan!r} backward"
    (M, K), r, dtype = X.shape, A.shape[0], X.dtype
    split = split_config(M, dtype, chip, r)
    make = {"make_dyb": need_x or need_a, "make_db": need_b, "make_dbias": need_bias}
    dYB, dB, dbias = dyb_db(dY, B, XA, scaling, split, **make)
    dX = dA = None
    if need_x and dYB is not None:
        make_da = need_a and r <= rank_block(dtype)
        if plan in DX:
            kernel, choose = DX[plan]
            tiles = tiles or choose(M, K, r, dtype, chip)
            dX, dA = kernel(dY, W, dYB, A, X, drop, tiles, chip.units, make_da=make_da)
        else:
            tiles = tiles or gemm_config(M, K, dtype, chip, wide_loads(dY, W, X))
            dX, dA = dx_da(dY, W, dYB, A, X, drop, tiles, make_da=make_da)
    if need_a and dA is None and dYB is not None:
        dA = da(dYB, X, drop, A.dtype, split)
    return dX, dA, dB, dbias


def _eager_bwd(
    dY: Tensor,
    X: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    XA: Tensor,
    scaling: float,
    drop: Dropout | None,
    needs: Sequence[bool],
    chip: Chip,
    dZ: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Run products by the vendor's library, but by our kernels those with a mask or with float32 low-rank operands."""
    need_x, need_a, need_b, need_bias = needs
    (M, K), dtype = X.shape, X.dtype
    dX = dA = None
    dbias = dY.sum(0) if need_bias else None
    if low_rank_dtype(dtype) is dtype:
        dB = (dY.t() @ XA).to(B.dtype) if need_b else None
        dYB = torch.addmm(XA, dY, B.to(dtype), beta=0, alpha=scaling) if need_x or need_a else None
    else:
        make = {"make_dyb": need_x or need_a, "make_db": need_b}
        dYB, dB, _ = dyb_db(dY, B, XA, scaling, split_config(M, dtype, chip, B.shape[1]), **make)
    by_library = library_low_rank(dtype, drop)
    if need_x and dYB is not None:
        dX = (dY if dZ is None else dZ) @ W
        if by_library:
            dX.addmm_(dYB, A.to(dtype))
        else:
            expand_add_(dX, dYB, A, drop, expand_config(M, K, dtype, chip, wide_loads(dY, W, X)))
    if dYB is None or not need_a:
        return dX, dA, dB, dbias
    if by_library:
        dA = (dYB.t() @ X).to(A.dtype)
    else:
        dA = da(dYB, X, drop, A.dtype, split_config(M, dtype, chip, A.shape[0]))
    return dX, dA, dB, dbias
