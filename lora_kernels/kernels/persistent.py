"""Pieces of persistent kernels: who makes XA, the flags that publish it, and the product that closes an accumulator.

A one-launch kernel deals out row blocks of XA first and output tiles afterwards to a grid whose programs are all
resident. Each block is published with a flag, and a tile acquires the flag of its row block only after its K loop.
docs/sm90_linear.md has the protocol and why it cannot wait for ever.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

XA_PROGRAMS = (8, 48)  # programs that make XA, where wave quantisation leaves fewer or more idle


def one_launch_grid(num_m: int, num_n: int, units: int) -> tuple[int, int]:
    """(programs, how many of them make XA) for num_m x num_n output tiles on ``units`` multiprocessors.

    XA goes to the programs that wave quantisation leaves with a tile less; where one wave holds everything, to
    programs that have no tile at all.
    """
    tiles = num_m * num_n
    programs = min(units, tiles + num_m)
    least, most = XA_PROGRAMS
    return programs, min(num_m, programs, max(least, min(most, -tiles % programs)))


_flags: dict[tuple[int, int], Tensor] = {}


def one_launch_flags(num_m: int, device: torch.device) -> Tensor:
    """int32 (2, num_m) of zeros, which the kernel finds and leaves: ready flags and counts of readers.

    Launches on one stream follow each other, so they share the flags of that stream; another stream has its own. A
    captured graph may be replayed beside its stream, so a capture takes flags from the graph's own memory.
    """
    if device.type != "cuda":
        return torch.zeros(2, num_m, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(2, num_m, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device)
    key = stream.device_index, stream.cuda_stream
    kept = _flags.get(key)
    if kept is None or kept.numel() < 2 * num_m:
        kept = _flags[key] = torch.zeros(2 * max(256, triton.next_power_of_2(num_m)), dtype=torch.int32, device=device)
    return kept[: 2 * num_m].view(2, num_m)


@triton.jit
def first_tile(xa_programs):
    """A program's first output tile: those that made XA start as many places late, they are the ones with one less."""
    first = tl.program_id(0) - xa_programs
    if first < 0:
        first += tl.num_programs(0)
    return first


@triton.jit
def publish(ready_ptr, block):
    """Release a row block whose ordinary stores every thread of this program has issued."""
    tl.debug_barrier()  # every thread's part of the block is written before one thread releases it
    tl.atomic_xchg(ready_ptr + block, 1, sem="release")


@triton.jit
def wait_for(ready_ptr, block):
    """Acquire a row block: its XA may be read by ordinary loads after this."""
    while tl.atomic_add(ready_ptr + block, 0, sem="acquire") == 0:
        pass


@triton.jit
def count_reader(ready_ptr, readers_ptr, block, num_readers):
    """One more tile has read the block; the last of num_readers puts both words back to 0 for the next launch."""
    tl.debug_barrier()  # every thread has read the block before it counts as read
    if tl.atomic_add(readers_ptr + block, 1, sem="acq_rel") == num_readers - 1:
        tl.atomic_xchg(readers_ptr + block, 0, sem="relaxed")
        tl.atomic_xchg(ready_ptr + block, 0, sem="relaxed")


@triton.jit
def rank_columns(P_ptr, offs, mask, offs_r, r, stride_p, stride_pr):
    """Columns offs_r of P (rows, r), any strides: p = P[offs, offs_r], zero from r on."""
    p_ptrs = P_ptr + offs[:, None].to(tl.int64) * stride_p + offs_r[None, :].to(tl.int64) * stride_pr
    return tl.load(p_ptrs, mask=mask[:, None] & (offs_r < r)[None, :], other=0.0)


@triton.jit
def add_low_rank(
    acc,
    S_ptr,
    T_ptr,
    offs_m,
    offs_n,
    M,
    N,
    r,
    stride_sm,
    stride_tn,
    stride_tr,
    BLOCK_R: tl.constexpr,
    RANK_STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + S T^T in steps of RANK_STEP ranks: how many are in registers beside a full accumulator.

    S (M, r) with ranks side by side, T (N, r) of any strides, converted to S's dtype; r at most BLOCK_R.
    """
    STEP: tl.constexpr = RANK_STEP if BLOCK_R > RANK_STEP else BLOCK_R
    for r0 in tl.static_range(0, BLOCK_R, STEP):
        offs_r = r0 + tl.arange(0, STEP)
        s = rank_columns(S_ptr, offs_m, offs_m < M, offs_r, r, stride_sm, 1)
        t = rank_columns(T_ptr, offs_n, offs_n < N, offs_r, r, stride_tn, stride_tr)
        acc = tl.dot(s, t.to(s.dtype).T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def halves(tile):
    """(left, right) columns of a tile, without moving a register."""
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (rows, 2, columns // 2)), (0, 2, 1)))
