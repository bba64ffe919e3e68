"""Run by test_dry_gpu.py in a process of its own: compiles kernels of known merit, prints what DryGPU says of them."""

import json
import sys
from dataclasses import asdict

import torch
import triton
import triton.language as tl

from lora_kernels.kernels.chip import CHIPS
from lora_kernels.testing.dry_gpu import DryGPU


@triton.jit
def _product_kernel(
    X_ptr, W_ptr, Y_ptr, M, N, K, stride_xm, stride_wn,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    rows = offs_m[:, None].to(tl.int64) if WIDE else offs_m[:, None]
    x_ptrs = X_ptr + rows * stride_xm + offs_k[None, :]
    w_ptrs = W_ptr + offs_n[None, :].to(tl.int64) * stride_wn + offs_k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = k + offs_k < K
        x = tl.load(x_ptrs, mask=(offs_m < M)[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=(offs_n < N)[None, :] & mask_k[:, None], other=0.0)
        acc = tl.dot(x, w, acc)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    y_ptrs = Y_ptr + offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
    tl.store(y_ptrs, acc.to(Y_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


def product(arch: str, tiles: tuple[int, int, int], warps: int = 4, stages: int = 3, wide: bool = True) -> dict:
    """What one launch of the product kernel takes on `arch`, or the error it raises."""
    X, W, Y = (torch.empty(4096, 4096, dtype=torch.bfloat16) for _ in range(3))
    grid = (triton.cdiv(4096, tiles[0]), triton.cdiv(4096, tiles[1]))
    with DryGPU(CHIPS[arch]) as gpu:
        for _ in range(2):
            try:
                _product_kernel[grid](
                    X, W, Y, 4096, 4096, 4096, 4096, 4096, wide, *tiles, num_warps=warps, num_stages=stages
                )
            except Exception as error:
                return {"error": f"{type(error).__name__}: {error}"}
    (kernel,) = gpu.kernels
    resources = asdict(kernel.resources)
    return {"launches": gpu.launches, "faults": kernel.faults(), "shared": kernel.shared, **resources}


if __name__ == "__main__":
    cases = {
        "sm_80": product("sm_80", (64, 64, 32)),
        "sm_90": product("sm_90", (128, 128, 64), warps=8),
        "sm_90 few rows": product("sm_90", (16, 64, 64)),
        "sm_100": product("sm_100", (128, 128, 64), warps=8),
        "gfx942": product("gfx942", (64, 64, 32), stages=2),
        "spills": product("sm_80", (128, 256, 16), stages=2),
        "too much shared memory": product("sm_86", (128, 128, 128), warps=8),
        "K of 8": product("sm_80", (64, 64, 8)),
        "narrow offset": product("sm_80", (64, 64, 32), wide=False),
    }
    json.dump(cases, sys.stdout)
