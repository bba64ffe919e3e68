"""The ring of the warp-specialised Hopper kernels: what the producer warp and the consumer warps do at every step.

    acc = P W^T (or P W) + S T^T         P (M,K)  W (N,K) (or (K,N))  S (M,r)  T (N,r)

Step i of a program uses slot i % STAGES for the (i // STAGES)-th time. Its `full` barrier ends a phase when the bytes
that the producer expects have landed, its `empty` barrier when the consumers say that the products which read it are
done; both count the uses of a slot, so the parity of i // STAGES is all that a wait has to know.
docs/sm90_gluon.md has the protocol and what checks it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton import knobs
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lora_kernels.errors import BackendUnavailableError
from lora_kernels.kernels.hopper.tma import descriptor_refusal

# names that Triton 3.7 and 3.9 changed
block_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def tile_order(tile, num_m, num_n, GROUP_M: gl.constexpr):
    """(pid_m, pid_n): tiles run down GROUP_M row blocks before the next column block, so that W tiles stay in L2."""
    width = GROUP_M * num_n
    first_m = (tile // width) * GROUP_M
    rows = gl.minimum(num_m - first_m, GROUP_M)
    return first_m + (tile % width) % rows, (tile % width) // rows


@gluon.jit
def make_ring(P_desc, Q_desc, STAGES: gl.constexpr):
    """A ring of STAGES slots: boxes of P and of Q, and the two barriers of every slot."""
    ps = gl.allocate_shared_memory(P_desc.dtype, [STAGES] + P_desc.block_type.shape, P_desc.layout)
    qs = gl.allocate_shared_memory(Q_desc.dtype, [STAGES] + Q_desc.block_type.shape, Q_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    return ps, qs, full, empty


@gluon.jit
def view(slot, desc):
    """A ring slot as a box of ``desc``: its own shape and swizzle, from the slot's first byte on."""
    return slot._reinterpret(desc.dtype, desc.block_type.shape, desc.layout)


@gluon.jit
def claim(empty, step, STAGES: gl.constexpr):
    """The slot of a step of the ring, once the products of STAGES steps ago have read it; new slots are free."""
    slot = step % STAGES
    mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
    return slot


@gluon.jit
def await_full(full, step, STAGES: gl.constexpr):
    """The slot of a step of the ring, once all that it expects has landed."""
    slot = step % STAGES
    mbarrier.wait(full.index(slot), (step // STAGES) & 1)
    return slot


@gluon.jit
def fill(P_desc, Q_desc, p_row, p_col, q_row, q_col, ps, qs, full, empty, step, STAGES: gl.constexpr):
    """One step of the producer: a box of P and a box of Q into the next slot."""
    slot = claim(empty, step, STAGES)
    bar = full.index(slot)
    mbarrier.expect(bar, P_desc.block_type.nbytes + Q_desc.block_type.nbytes)
    tma_load(P_desc, [p_row, p_col], bar, view(ps.index(slot), P_desc))
    tma_load(Q_desc, [q_row, q_col], bar, view(qs.index(slot), Q_desc))
    return step + 1


@gluon.jit
def fill_tile(
    P_desc, W_desc, row, col, num_k, ps, ws, full, empty, step, W_BY_ROWS: gl.constexpr, STAGES: gl.constexpr
):
    """The producer's K loop: boxes of P from ``row`` on, boxes of W (N, K) by rows from ``col`` on or by columns."""
    STEP: gl.constexpr = P_desc.block_type.shape[1]
    for k in range(num_k):
        if W_BY_ROWS:
            step = fill(P_desc, W_desc, row, k * STEP, col, k * STEP, ps, ws, full, empty, step, STAGES)
        else:
            step = fill(P_desc, W_desc, row, k * STEP, k * STEP, col, ps, ws, full, empty, step, STAGES)
    return step


@gluon.jit
def accumulate(acc, W_desc, ps, ws, full, empty, num_k, step, W_BY_ROWS: gl.constexpr, STAGES: gl.constexpr):
    """The consumers' K loop: acc + P W^T, or P W. One product is in flight; the slot before it is given back."""
    for k in range(num_k):
        slot = await_full(full, step, STAGES)
        w = view(ws.index(slot), W_desc)
        if W_BY_ROWS:
            acc = warpgroup_mma(ps.index(slot), w.permute((1, 0)), acc, is_async=True)
        else:
            acc = warpgroup_mma(ps.index(slot), w, acc, is_async=True)
        acc = warpgroup_mma_wait(1, (acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
        step += 1
    return acc, step


@gluon.jit
def settle(acc, empty, step, STAGES: gl.constexpr):
    """The K loop's accumulator once its last product is done; gives back the slot of that."""
    acc = warpgroup_mma_wait(0, (acc,))
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
    return acc


@gluon.jit
def close(acc, S_desc, T_desc, ss, ts, full, empty, step, STAGES: gl.constexpr):
    """acc + S T^T from the ring's next slot, all products done; gives back that slot and the one before it."""
    slot = await_full(full, step, STAGES)
    acc = warpgroup_mma(view(ss.index(slot), S_desc), view(ts.index(slot), T_desc).permute((1, 0)), acc, is_async=True)
    acc = warpgroup_mma_wait(0, (acc,))
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
    mbarrier.arrive(empty.index(slot), count=1)
    return acc, step + 1


@gluon.jit
def store_half(half, bias_ptr, stride_bias, N, Y_desc, out, row, col, HAS_BIAS: gl.constexpr):
    """half + bias through shared memory to Y, once the half before it has left that memory."""
    if HAS_BIAS:
        offs_n = col + gl.arange(0, half.shape[1], gl.SliceLayout(0, half.type.layout))
        bias = gl.load(bias_ptr + offs_n.to(gl.int64) * stride_bias, mask=offs_n < N, other=0.0)
        half += bias.to(gl.float32)[None, :]
    tma.store_wait(0)
    out.store(half.to(Y_desc.dtype))
    fence_async_shared()
    tma_store(Y_desc, [row, col], out)


@gluon.jit
def finish(acc, bias_ptr, stride_bias, N, Y_desc, out, row, col, HAS_BIAS: gl.constexpr):
    """Y = acc + bias in two halves of the columns: half the shared memory of a whole tile buys a slot."""
    BLOCK_M: gl.constexpr = acc.shape[0]
    HALF: gl.constexpr = acc.shape[1] // 2
    left, right = acc.reshape((BLOCK_M, 2, HALF)).permute((0, 2, 1)).split()
    store_half(left, bias_ptr, stride_bias, N, Y_desc, out, row, col, HAS_BIAS)
    store_half(right, bias_ptr, stride_bias, N, Y_desc, out, row, col + HALF, HAS_BIAS)


@functools.cache
def _swizzle(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """The layout of a box: swizzled over 32, 64 or 128 bytes, as wide as its rows allow."""
    return gl.NVMMASharedLayout.get_default_for(
        [rows, columns], {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[dtype]
    )


def box(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Descriptor of a matrix in boxes of rows x columns, zeros past the end."""
    stride = t.stride(0) if t.shape[0] > 1 else -(-t.shape[1] // 8) * 8  # a lone row's is never used, but checked
    return TensorDescriptor(t, list(t.shape), [stride, 1], [rows, columns], _swizzle(rows, columns, t.dtype))


def low_rank_operand(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A or B, XA or dYB as a descriptor takes it: 16 bit, rows 16 bytes apart. What is not so already is copied.

    One launch of 2 (rows + columns) r bytes for adapters in float32 or of other strides and for r % 8 > 0, else none.
    """
    if t.dtype == dtype and descriptor_refusal(t=t) is None:
        return t
    rows, columns = t.shape
    copy = torch.empty(rows, -(-columns // 8) * 8, dtype=dtype, device=t.device)[:, :columns]
    return copy.copy_(t)


_launch = type(tile_order).run  # an emulator puts itself in its place


def check_descriptors(**tensors: Tensor) -> None:
    """Raises BackendUnavailableError where a large operand cannot go through a descriptor, none of them is copied; and
    in Triton's interpreter, which has no Gluon."""
    if reason := descriptor_refusal(**tensors):
        raise BackendUnavailableError(f"Gluon kernels cannot take this call: {reason}; copy it or name no plan")
    if knobs.runtime.interpret and type(tile_order).run is _launch:
        raise BackendUnavailableError("Triton's interpreter has no Gluon; name another plan, or use gluon_emulator")
