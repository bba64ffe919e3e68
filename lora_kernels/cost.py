"""What a plan costs: its launches, the FLOP and bytes of each, and the time a chip should take for them.

Per launch the larger of FLOP over rate and bytes over bandwidth, plus a fixed cost. Rates are data-sheet figures times
efficiencies that no GPU of ours has measured yet, chosen so that the vendor's library keeps the base GEMM wherever the
prediction is not clearly in favour of ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_kernels.kernels.chip import Chip
from lora_kernels.kernels.tuning import rank_block

LAUNCH_SECONDS = 2.5e-6
LIBRARY_EFFICIENCY = 0.75  # of the data-sheet rate, a large product by the vendor's library
POINTER_EFFICIENCY = {"sm_80": 0.66, "sm_86": 0.68, "sm_89": 0.68, "sm_90": 0.5, "sm_100": 0.3}  # our pointer kernels
TMA_EFFICIENCY = {"sm_90": 0.72, "sm_100": 0.3}  # our kernels with TMA descriptors
BANDWIDTH_EFFICIENCY = 0.88
OPT_IN = ("tma_extend", "one_launch")  # plans that run only where they are named: no GPU has run them yet


@dataclass(frozen=True)
class Problem:
    """One call as the planner sees it: direction, sizes, dtype, and what it must make."""

    op: str  # "fwd" or "bwd"
    M: int
    N: int
    K: int
    r: int
    dtype: torch.dtype
    dropout: bool = False
    bias: bool = False
    need_dx: bool = True


@dataclass(frozen=True)
class Launch:
    """One kernel: its name, FLOP, bytes moved to and from memory, and which efficiency applies."""

    kernel: str
    flop: int
    bytes: int
    library: bool = False
    tma: bool = False


@dataclass(frozen=True)
class Plan:
    """A way to carry out a Problem, with the launches it takes and the time predicted for them."""

    name: str
    launches: tuple[Launch, ...]
    seconds: float
    refused: str | None = None

    @property
    def bytes(self) -> int:
        return sum(launch.bytes for launch in self.launches)

    @property
    def opt_in(self) -> bool:
        return self.name in OPT_IN

    def __str__(self) -> str:
        if self.refused:
            return f"{self.name}: refused, {self.refused}"
        kernels = " + ".join(launch.kernel for launch in self.launches)
        note = "; never chosen unless named, no GPU has run it yet" if self.opt_in else ""
        return f"{self.name}: {self.seconds * 1e6:.1f} us predicted, {self.bytes / 1e6:.1f} MB, {kernels}{note}"


def launches(name: str, problem: Problem) -> tuple[Launch, ...]:
    """The launches of plan ``name`` for ``problem``, in order."""
    return (_fwd_launches if problem.op == "fwd" else _bwd_launches)(name, problem)


def seconds(launch: Launch, dtype: torch.dtype, chip: Chip) -> float:
    """Predicted seconds of one launch on ``chip``, its launch cost included."""
    scalar = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    rate = (chip.fp32_tflops if scalar else chip.tflops / (2 if dtype == torch.float32 else 1)) * 1e12
    if launch.library:
        rate *= LIBRARY_EFFICIENCY
    elif launch.tma:
        rate *= TMA_EFFICIENCY.get(chip.arch, 0.4)
    else:
        rate *= 0.4 if scalar else POINTER_EFFICIENCY.get(chip.arch, 0.4)
    return max(launch.flop / rate, launch.bytes / (chip.gbps * 1e9 * BANDWIDTH_EFFICIENCY)) + LAUNCH_SECONDS


def _fwd_launches(name: str, q: Problem) -> tuple[Launch, ...]:
    e, (M, N, K, r) = q.dtype.itemsize, (q.M, q.N, q.K, q.r)
    read_x = -(-r // rank_block(q.dtype))
    shrink = Launch("shrink", 2 * M * K * r, e * (read_x * M * K + r * K + M * r), library=not q.dropout)
    base = Launch("matmul", 2 * M * N * K, e * (M * K + N * K + M * N), library=True)
    add = Launch("addmm_", 2 * M * N * r, e * (2 * M * N + M * r + N * r), library=True)
    extend = Launch("extend", 2 * M * N * (K + r), e * (M * K + N * K + M * N + M * r + N * r))
    match name:
        case "eager":
            return (shrink, base, add)
        case "shrink_extend":
            return (Launch("shrink", shrink.flop, shrink.bytes), extend)
        case "tma_extend":
            return (Launch("shrink", shrink.flop, shrink.bytes), Launch(name, extend.flop, extend.bytes, tma=True))
        case "one_launch":  # X is read a second time, from L2
            return (Launch(name, shrink.flop + extend.flop, extend.bytes + e * (r * K + M * r), tma=True),)
        case _:
            tiles = -(-N // 64)
            flop = 2 * M * N * (K + r) + 2 * tiles * M * K * max(r, 16)
            return (Launch("one_pass", flop, extend.bytes + e * r * K),)


def _bwd_launches(name: str, q: Problem) -> tuple[Launch, ...]:
    e, (M, N, K, r) = q.dtype.itemsize, (q.M, q.N, q.K, q.r)
    dy, x, small = e * M * N, e * M * K, e * r * (M + N + K)
    reads = -(-r // rank_block(q.dtype))
    base = Launch("matmul", 2 * M * N * K, dy + x + e * N * K, library=True)
    launches: list[Launch] = []
    if name == "eager":
        launches += [Launch("dYB", 2 * M * N * r, dy + small, library=True)]
        launches += [Launch("dB", 2 * M * N * r, dy + small, library=True)]
        if q.need_dx:
            launches += [base, Launch("expand", 2 * M * K * r, 2 * x + small, library=not q.dropout)]
        if q.dropout:
            launches += [Launch("dA", 2 * M * K * r, reads * x + small), Launch("reduce", 0, small)]
        else:
            launches += [Launch("dA", 2 * M * K * r, x + small, library=True)]
        return tuple(launches)
    parts = 4 * r * (M * -(-N // 128) + N * -(-M // 512))
    launches += [Launch("dYB+dB", 4 * M * N * r, reads * dy + parts + small), Launch("reduce", 0, parts + small)]
    da_parts = 4 * r * K * -(-M // 128)
    if q.need_dx:
        fused = r <= rank_block(q.dtype)
        extra = (x + da_parts) if fused else 0
        flop = 2 * M * K * (N + r) + (2 * M * K * r if fused else 0)
        launches += [Launch("dX+dA" if fused else "dX", flop, base.bytes + extra + small)]
    if not q.need_dx or r > rank_block(q.dtype):
        launches += [Launch("dA", 2 * M * K * r, reads * x + da_parts + small)]
    return (*launches, Launch("reduce", 0, da_parts + small))
