"""The activation of a SwiGLU block, and its gradient, which computes the activation again.

    H  = silu(G) * U = G s U                          s = 1 / (1 + exp(-G)), fp32 inside, rounded once
    dG = dH U s (1 + G (1 - s)),   dU = dH G s        G, U, H, dH, dG, dU (M, F)

Memory bound: forward reads two and writes one; backward reads three and writes two, or three with H, which
overwrites dH. A separate pass for H would read G and U and write H once more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.launch import launch
from lora_kernels.kernels.tiles import ShrinkConfig

TILES = ShrinkConfig(1, 1024, num_warps=4, num_stages=1)  # 8 elements, 16 bytes of 16 bits, a thread


@triton.jit
def _swiglu_kernel(G_ptr, U_ptr, H_ptr, F, stride_g, stride_u, BLOCK: tl.constexpr):
    """H = silu(G) * U for BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < F
    g = tl.load(G_ptr + row * stride_g + offs, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(U_ptr + row * stride_u + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(H_ptr + row * F + offs, (g * tl.sigmoid(g) * u).to(H_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_bwd_kernel(
    dH_ptr, G_ptr, U_ptr, dG_ptr, dU_ptr, F, stride_g, stride_u, MAKE_H: tl.constexpr, BLOCK: tl.constexpr
):
    """dG = dH U s (1 + G (1 - s)) and dU = dH G s for BLOCK columns of one row; H = G s U overwrites dH."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < F
    dtype = dG_ptr.dtype.element_ty
    at = row * F + offs
    dh = tl.load(dH_ptr + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(G_ptr + row * stride_g + offs, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(U_ptr + row * stride_u + offs, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(dG_ptr + at, (dh * u * s * (1 + g * (1 - s))).to(dtype), mask=mask)
    tl.store(dU_ptr + at, (dh * g * s).to(dtype), mask=mask)
    if MAKE_H:
        tl.store(dH_ptr + at, (g * s * u).to(dtype), mask=mask)


def _grid(M: int, F: int) -> tuple[int, int]:
    return M, triton.cdiv(F, TILES.BLOCK_K)


def swiglu(G: Tensor, U: Tensor) -> Tensor:
    """H (M, F) = silu(G) * U, contiguous; G and U have contiguous rows and any row stride; M > 0."""
    M, F = G.shape
    H = torch.empty(M, F, dtype=G.dtype, device=G.device)
    strides = G.stride(0), U.stride(0)
    launch(_swiglu_kernel, _grid(M, F), G.device, G, U, H, F, *strides, BLOCK=TILES.BLOCK_K, num_warps=TILES.num_warps)
    return H


def swiglu_bwd(dH: Tensor, G: Tensor, U: Tensor, make_h: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """dG, dU and, with ``make_h``, H: (M, F) each, one launch.

    ``dH`` is contiguous and is overwritten by H: no other tensor may use it. M > 0.
    """
    M, F = G.shape
    dG, dU = torch.empty_like(dH), torch.empty_like(dH)
    launch(
        _swiglu_bwd_kernel,
        _grid(M, F),
        G.device,
        dH,
        G,
        U,
        dG,
        dU,
        F,
        G.stride(0),
        U.stride(0),
        MAKE_H=make_h,
        BLOCK=TILES.BLOCK_K,
        num_warps=TILES.num_warps,
    )
    return dG, dU, dH if make_h else None
