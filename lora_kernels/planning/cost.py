"""Cost model of a LoRA linear layer: FLOP and bytes of every kernel, and the time predicted for them on a chip.

A kernel's time is the larger of FLOP / rate and bytes / bandwidth, plus a fixed cost for each launch. Rates are
data-sheet figures times efficiencies that have not been measured on a GPU yet. They are chosen so that the vendor's
library computes the base GEMM unless the prediction clearly favours a kernel of this package. plans.py composes
kernels into plans.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from lora_kernels.kernels.chip import Chip
from lora_kernels.kernels.hopper.gluon_tiles import GluonConfig
from lora_kernels.kernels.tiles import Config, rank_block

Tiles = Config | GluonConfig  # of a plan's main product
LAUNCH_SECONDS = 2.5e-6
# Fraction of the data-sheet rate that a large product reaches: the vendor's library, our kernels by architecture.
LIBRARY_EFFICIENCY = 0.75
EFFICIENCY = {
    "pointer": {"sm_80": 0.66, "sm_86": 0.68, "sm_89": 0.68, "sm_90": 0.5, "sm_100": 0.3},
    "tma": {"sm_90": 0.72, "sm_100": 0.3},
    "gluon": {"sm_90": 0.74},
}
BANDWIDTH_EFFICIENCY = 0.88


@dataclass(frozen=True)
class CallShape:
    """The planner's key of one call: direction, sizes, dtype, and which results are needed.

    ``bits``: dropout's mask is kept as packed bits (forward writes them, backward reads them), not drawn again.
    ``descriptors``: TMA descriptors accept the strides and addresses of this call's tensors.
    """

    op: str  # "fwd" or "bwd"
    M: int
    N: int
    K: int
    r: int
    dtype: torch.dtype
    dropout: bool = False
    bias: bool = False
    need_dx: bool = True
    bits: bool = True
    descriptors: bool = True

    @property
    def mask_bytes(self) -> int:
        """Bytes of the packed mask; 0 without one."""
        return self.M * 16 * -(-self.K // 128) if self.dropout and self.bits else 0


@dataclass(frozen=True)
class Launch:
    """One kernel: its name, FLOP, bytes moved to and from memory, and the efficiency that applies.

    ``maker``: "library" (the vendor's), or one of EFFICIENCY: "pointer", "tma", "gluon".
    """

    kernel: str
    flop: int
    bytes: int
    maker: str = "pointer"

    @property
    def library(self) -> bool:
        return self.maker == "library"


@dataclass(frozen=True)
class Plan:
    """One way to compute a CallShape: its launches, the time predicted for them, and why it was chosen.

    ``seconds``: predicted. ``measured``: seconds in the tuned table of this GPU, None if it has none. ``tiles``: of
    the main product, None for the default. ``refused``: why it cannot run here. ``why``: "model", "tuned on this GPU"
    or "named"; empty for a plan that was not chosen. ``descriptors``: it reads its matrices by TMA.
    """

    name: str
    launches: tuple[Launch, ...]
    seconds: float
    refused: str | None = None
    opt_in: bool = False
    tiles: Tiles | None = None
    measured: float | None = None
    why: str = ""
    descriptors: bool = False

    @property
    def bytes(self) -> int:
        return sum(launch.bytes for launch in self.launches)

    def __str__(self) -> str:
        if self.refused:
            return f"{self.name}: refused, {self.refused}"
        kernels = " + ".join(launch.kernel for launch in self.launches)
        time = f"{self.seconds * 1e6:.1f} us predicted"
        if self.measured is not None:
            time += f", {self.measured * 1e6:.1f} us measured"
        note = "; never chosen unless named or measured" if self.opt_in and self.measured is None else ""
        return f"{self.name}: {time}, {self.bytes / 1e6:.1f} MB, {kernels}{note}"


def seconds(launch: Launch, dtype: torch.dtype, chip: Chip) -> float:
    """Predicted seconds of one launch on ``chip``, including the launch cost."""
    scalar = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    rate = (chip.fp32_tflops if scalar else chip.tflops / (2 if dtype == torch.float32 else 1)) * 1e12
    if launch.library:
        rate *= LIBRARY_EFFICIENCY
    else:
        rate *= 0.4 if scalar else EFFICIENCY[launch.maker].get(chip.arch, 0.4)
    return max(launch.flop / rate, launch.bytes / (chip.gbps * 1e9 * BANDWIDTH_EFFICIENCY)) + LAUNCH_SECONDS


def _passes(q: CallShape) -> int:
    """Number of times that a kernel reads its matrix: once for each tile of ranks."""
    return -(-q.r // rank_block(q.dtype))


def shrink(q: CallShape) -> Launch:
    """XA = (D*X) A^T, and the mask's bits."""
    e = q.dtype.itemsize
    moved = e * (_passes(q) * q.M * q.K + q.r * q.K + q.M * q.r) + q.mask_bytes
    return Launch("shrink", 2 * q.M * q.K * q.r, moved)


def extend(q: CallShape) -> Launch:
    """Y = X W^T + XA B^T."""
    moved = q.M * q.K + q.N * q.K + q.M * q.N + q.M * q.r + q.N * q.r
    return Launch("extend", 2 * q.M * q.N * (q.K + q.r), q.dtype.itemsize * moved)


def one_launch(q: CallShape) -> Launch:
    """XA and Y in one launch; X is read a second time, from L2."""
    flop = 2 * q.M * q.K * q.r + 2 * q.M * q.N * (q.K + q.r)
    return Launch("one_launch", flop, extend(q).bytes + q.dtype.itemsize * (q.r * q.K + q.M * q.r))


def one_pass(q: CallShape) -> Launch:
    """XA and Y; XA is computed again in every column block of Y."""
    flop = 2 * q.M * q.N * (q.K + q.r) + 2 * -(-q.N // 64) * q.M * q.K * max(q.r, 16)
    return Launch("one_pass", flop, extend(q).bytes + q.dtype.itemsize * q.r * q.K + q.mask_bytes)


def _small(q: CallShape) -> int:
    """Bytes of dYB, B and A: an upper estimate for any pass of the backward."""
    return q.dtype.itemsize * q.r * (q.M + q.N + q.K)


def _dyb_db_parts(q: CallShape) -> int:
    return 4 * q.r * (q.M * -(-q.N // 128) + q.N * -(-q.M // 512))


def _da_parts(q: CallShape) -> int:
    """Bytes of dA's fp32 partials, one for each row block; an upper estimate for tma_dx, which first adds up to 8."""
    return 4 * q.r * q.K * -(-q.M // 128)


def dyb_db(q: CallShape) -> Launch:
    """dYB = s dY B and dB = dY^T XA from one read of dY for each tile of ranks, as fp32 partials."""
    moved = _passes(q) * q.dtype.itemsize * q.M * q.N + _dyb_db_parts(q) + _small(q)
    return Launch("dyb_db", 4 * q.M * q.N * q.r, moved)


def reduce(q: CallShape) -> Launch:
    """The sum of dyb_db's partials."""
    return Launch("reduce", 0, _dyb_db_parts(q) + _small(q))


def reduce_da(q: CallShape) -> Launch:
    """The sum of dA's partials, by the same kernel as reduce."""
    return Launch("reduce", 0, _da_parts(q) + _small(q))


def makes_da(q: CallShape) -> bool:
    """Whether dX's epilogue computes dA: all ranks fit one tile."""
    return q.r <= rank_block(q.dtype)


def dx_da(q: CallShape) -> Launch:
    """dX = dY W + D*(dYB A), and dA's partials from the X tile if all ranks fit one tile."""
    e, flop = q.dtype.itemsize, 2 * q.M * q.K * (q.N + q.r)
    moved = e * (q.M * q.N + q.N * q.K + q.M * q.K) + _small(q) + q.mask_bytes
    if makes_da(q):
        flop, moved = flop + 2 * q.M * q.K * q.r, moved + e * q.M * q.K + _da_parts(q)
    return Launch("dx_da", flop, moved)


def da(q: CallShape) -> Launch:
    """dA = dYB^T (D*X) in a separate pass, as fp32 partials."""
    moved = _passes(q) * (q.dtype.itemsize * q.M * q.K + q.mask_bytes) + _da_parts(q) + _small(q)
    return Launch("da", 2 * q.M * q.K * q.r, moved)


def expand(q: CallShape) -> Launch:
    """dX += D*(dYB A): a read and a write of dX."""
    return Launch("expand", 2 * q.M * q.K * q.r, 2 * q.dtype.itemsize * q.M * q.K + _small(q) + q.mask_bytes)


def _as(kernel: Callable[[CallShape], Launch], name: str, maker: str) -> Callable[[CallShape], Launch]:
    """The same work by another kernel."""
    return lambda q: replace(kernel(q), kernel=name, maker=maker)


# The kernels of a LoRA linear layer: launch name -> cost of a CallShape.
KERNELS: dict[str, Callable[[CallShape], Launch]] = {
    kernel.__name__: kernel for kernel in (shrink, extend, one_pass, dyb_db, dx_da, da, expand, reduce)
} | {
    "ptr_one_launch": _as(one_launch, "ptr_one_launch", "pointer"),
    "tma_extend": _as(extend, "tma_extend", "tma"),
    "one_launch": _as(one_launch, "one_launch", "tma"),
    "tma_dx": _as(dx_da, "tma_dx", "tma"),
    "gluon_extend": _as(extend, "gluon_extend", "gluon"),
    "gluon_one_launch": _as(one_launch, "gluon_one_launch", "gluon"),
    "gluon_dx": _as(dx_da, "gluon_dx", "gluon"),
}


def library(kernel: str, M: int, N: int, K: int, itemsize: int, add: bool = False) -> Launch:
    """A product (M, K) x (K, N) by the vendor's library; with ``add`` it also reads the output it adds to."""
    return Launch(kernel, 2 * M * N * K, itemsize * (M * K + N * K + (2 if add else 1) * M * N), "library")
