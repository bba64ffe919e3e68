"""out = factor * (part_0 + part_1 + ... ): fp32 partials summed in a fixed order, several outputs in one launch.

part (P, n) fp32 -> out (n,) in any dtype
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.kernels.launch import launch

BLOCK = 512


class Partial(NamedTuple):
    """Partial sums (P, *shape) in fp32 (None: nothing to make), the dtype of their sum, and a factor for it."""

    part: Tensor | None
    dtype: torch.dtype
    factor: float = 1.0


@triton.jit
def _sum_block(part_ptr, out_ptr, n, count, factor, block, BLOCK: tl.constexpr):
    """One block of out = factor * sum over the first axis of part (count, n)."""
    offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    acc = tl.zeros((BLOCK,), tl.float32)
    part_ptrs = part_ptr + offs
    step = tl.cast(n, tl.int64)
    for _ in range(0, count):
        acc += tl.load(part_ptrs, mask=mask, other=0.0)
        part_ptrs += step
    tl.store(out_ptr + offs, (acc * factor).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _reduce_kernel(
    part0_ptr,
    out0_ptr,
    n0,
    count0,
    factor0,
    part1_ptr,
    out1_ptr,
    n1,
    count1,
    factor1,
    part2_ptr,
    out2_ptr,
    n2,
    count2,
    factor2,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out_i = factor_i * sum over partials of part_i; consecutive programs serve output 0, then 1, then 2."""
    pid = tl.program_id(0)
    blocks0 = tl.cdiv(n0, BLOCK)
    if pid < blocks0:
        _sum_block(part0_ptr, out0_ptr, n0, count0, factor0, pid, BLOCK)
    if OUTPUTS > 1:
        blocks1 = tl.cdiv(n1, BLOCK)
        if (pid >= blocks0) & (pid < blocks0 + blocks1):
            _sum_block(part1_ptr, out1_ptr, n1, count1, factor1, pid - blocks0, BLOCK)
        if OUTPUTS > 2:  # a compile-time question, kept apart from the run-time one
            last = pid - blocks0 - blocks1
            if last >= 0:
                _sum_block(part2_ptr, out2_ptr, n2, count2, factor2, last, BLOCK)


def reduce_partials(*partials: Partial) -> tuple[Tensor | None, ...]:
    """The sums of up to three Partials in one launch, in order; None where there is nothing to make."""
    live = [p for p in partials if p.part is not None]
    outs = [torch.empty(p.part.shape[1:], dtype=p.dtype, device=p.part.device) for p in live]  # type: ignore[union-attr]
    if live:
        args: list[object] = []
        for i in range(3):
            if i < len(live):
                part = live[i].part
                assert part is not None
                args += [part, outs[i], outs[i].numel(), part.shape[0], live[i].factor]
            else:
                args += [None, None, 0, 0, 0.0]
        grid = sum(triton.cdiv(out.numel(), BLOCK) for out in outs)
        launch(_reduce_kernel, (grid,), outs[0].device, *args, OUTPUTS=len(live), BLOCK=BLOCK, num_warps=4)
    made = iter(outs)
    return tuple(None if p.part is None else next(made) for p in partials)
