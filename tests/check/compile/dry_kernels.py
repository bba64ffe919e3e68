"""Run by test_dry_gpu.py in a process of its own: compiles kernels of known merit, prints what DryGPU says of them."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.check.compile.dry_gpu import DryGPU
from lora_kernels.kernels.chip import CHIPS


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


@triton.jit
def _tiles_kernel(
    X_desc, W_desc, Y_desc, count_ptr, M, N, K, FLATTEN: tl.constexpr, COUNT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    num_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * num_n, tl.num_programs(0), flatten=FLATTEN):
        row, col = (tile // num_n) * BLOCK_M, (tile % num_n) * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, tl.cdiv(K, BLOCK_K)):
            acc = tl.dot(X_desc.load([row, k * BLOCK_K]), W_desc.load([col, k * BLOCK_K]).T, acc)
        if COUNT:
            while tl.atomic_add(count_ptr + tile // num_n, 0, sem="acquire") == 0:
                pass
            tl.debug_barrier()
            if tl.atomic_add(count_ptr + tile // num_n, 1, sem="acq_rel") == num_n - 1:
                tl.atomic_xchg(count_ptr + tile // num_n, 0, sem="relaxed")
        Y_desc.store([row, col], acc.to(Y_desc.dtype))


_tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def _fill(X_desc, slot, full, row):
    mbarrier.expect(full, X_desc.block_type.nbytes)
    _tma_load(X_desc, [row, 0], full, slot)


@gluon.jit
def _empty(Y_ptr, slot, full, row, stride_ym, WIDE: gl.constexpr, SHAPE: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    mbarrier.wait(full, 0)
    rows = row + gl.arange(0, SHAPE[0], gl.SliceLayout(1, layout))
    if WIDE:
        rows = rows.to(gl.int64)
    columns = gl.arange(0, SHAPE[1], gl.SliceLayout(0, layout))
    gl.store(Y_ptr + rows[:, None] * stride_ym + columns[None, :], slot.load(layout))


@gluon.jit
def _copy_kernel(X_desc, Y_ptr, stride_ym, WIDE: gl.constexpr, num_warps: gl.constexpr):
    slot = gl.allocate_shared_memory(X_desc.dtype, X_desc.block_type.shape, X_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    row = gl.program_id(0) * X_desc.block_type.shape[0]
    shape: gl.constexpr = X_desc.block_type.shape
    gl.warp_specialize(
        [(_empty, (Y_ptr, slot, full, row, stride_ym, WIDE, shape)), (_fill, (X_desc, slot, full, row))], [1], [24]
    )


@triton.jit
def _sum_kernel(parts, strides, out_ptr, M, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for p in tl.static_range(len(parts)):
        acc += tl.load(parts[p] + offs * strides[p], mask=offs < M, other=0.0)
    tl.store(out_ptr + offs, acc, mask=offs < M)


def product(arch: str, tiles: tuple[int, int, int], warps: int = 4, stages: int = 3, wide: bool = True) -> dict:
    """What one launch of the product kernel takes on `arch`, or the error it raises."""
    X, W, Y = matrices()
    grid = (triton.cdiv(4096, tiles[0]), triton.cdiv(4096, tiles[1]))
    options = {"num_warps": warps, "num_stages": stages}
    return told(arch, lambda: _product_kernel[grid](X, W, Y, 4096, 4096, 4096, 4096, 4096, wide, *tiles, **options))


def persistent(arch: str, flatten: bool, count: bool) -> dict:
    """The same of a persistent product with TMA descriptors in 128 x 256 x 64 tiles and 3 stages."""
    X, W, Y = matrices()
    boxes = ((X, [128, 64]), (W, [256, 64]), (Y, [128, 256]))
    descriptors = [TensorDescriptor(t, [4096, 4096], [4096, 1], box) for t, box in boxes]
    counts, sizes = torch.empty(32, dtype=torch.int32), (4096, 4096, 4096)
    return told(
        arch,
        lambda: _tiles_kernel[(132,)](
            *descriptors, counts, *sizes, flatten, count, 128, 256, 64, num_warps=8, num_stages=3
        ),
    )


def copy(wide: bool) -> dict:
    """The same of a warp-specialised copy in Gluon."""
    X, _, Y = matrices()
    layout = gl.NVMMASharedLayout.get_default_for([128, 64], gl.bfloat16)
    descriptor = GluonDescriptor.from_tensor(X, [128, 64], layout)
    return told("sm_90", lambda: _copy_kernel[(32,)](descriptor, Y, Y.stride(0), wide, num_warps=4))


def total() -> dict:
    """The same of a sum over tuples of pointers and strides."""
    parts = tuple(torch.empty(64, 3) for _ in range(2))
    strides = tuple(part.stride(0) for part in parts)
    return told("sm_80", lambda: _sum_kernel[(1,)](parts, strides, parts[0], 64, 64))


def matrices() -> list[torch.Tensor]:
    return [torch.empty(4096, 4096, dtype=torch.bfloat16) for _ in range(3)]


def told(arch: str, launch: Callable[[], object]) -> dict:
    """What DryGPU says of a kernel launched twice, or the error it raises."""
    with DryGPU(CHIPS[arch]) as gpu:
        for _ in range(2):
            try:
                launch()
            except Exception as error:
                return {"error": f"{type(error).__name__}: {error}"}
    (kernel,) = gpu.kernels
    resources = asdict(kernel.resources)
    return {
        "launches": gpu.launches,
        "faults": kernel.faults(),
        "shared": kernel.shared,
        "warps": kernel.num_warps,
        **resources,
    }


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
        "TMA": persistent("sm_90", flatten=True, count=False),
        "atomics in a flattened loop": persistent("sm_90", flatten=True, count=True),
        "Gluon": copy(wide=True),
        "Gluon, narrow offset": copy(wide=False),
        "tuples": total(),
    }
    json.dump(cases, sys.stdout)
