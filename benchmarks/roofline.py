"""The least time a case can take: FLOP over the measured matrix rate, bytes over the measured copy rate."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.cases import DTYPE_NAMES, Case
from benchmarks.rows import Record, Row
from benchmarks.timing import Call, Clock, interleaved


@dataclass(frozen=True)
class Work:
    """FLOP and bytes of one call: every input read once, every output written once; no mask, no intermediate."""

    flop: int
    bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flop + other.flop, self.bytes + other.bytes)


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches: TFLOP/s of a large square product by dtype, GB/s of a large copy (read + write)."""

    tflops: dict[str, float]
    gbps: float

    def milliseconds(self, work: Work, dtype: torch.dtype) -> float:
        """The larger of arithmetic and traffic."""
        return max(work.flop / (self.tflops[DTYPE_NAMES[dtype]] * 1e9), work.bytes / (self.gbps * 1e6))


def forward_work(case: Case, lora: bool = True) -> Work:
    """The products, and with ``lora`` + s (X A^T) B^T with XA kept for the backward; an MLP keeps gate and up."""
    M, e, r = case.M, case.dtype.itemsize, case.r if lora else 0
    flop = sum(2 * M * N * K + 2 * M * r * (N + K) for N, K in case.linears)
    weights = sum(N * K + r * (N + K + M) for N, K in case.linears)
    made = 2 * case.N + case.K if case.op == "lora_mlp" else case.N
    return Work(flop, e * (weights + M * (case.K + made)))


def backward_work(case: Case, lora: bool = True) -> Work:
    """dX alone for frozen layers; dX, dA and dB with ``lora``, which reads X and XA as well."""
    M, e, r = case.M, case.dtype.itemsize, case.r if lora else 0
    flop = sum(2 * M * N * K + 4 * M * r * (N + K) for N, K in case.linears)
    weights = sum(N * K + r * (N + K + M) + r * (N + K) for N, K in case.linears)
    reads = 2 * case.N + case.K if case.op == "lora_mlp" else case.N
    return Work(flop, e * (weights + M * (reads + case.K + (case.K if lora else 0))))


def passes(case: Case, mode: str, lora: bool = True) -> tuple[Work, ...]:
    """The work of ``mode``, a mode's name starting with "fwd" or "fwd_bwd", pass by pass."""
    forward = forward_work(case, lora)
    return (forward, backward_work(case, lora)) if mode.startswith("fwd_bwd") else (forward,)


def measure_ceilings(
    clock: Clock, device: torch.device, dtypes: tuple[torch.dtype, ...], side: int, copy_bytes: int, rounds: int = 5
) -> Ceilings:
    """The two ceilings, on random data: products of ``side`` squared matrices, a copy of ``copy_bytes`` bytes."""
    source = torch.rand(copy_bytes // 4, device=device)
    calls: dict[str, Call] = {"copy": partial(torch.empty_like(source).copy_, source)}
    for dtype in dtypes:
        P, Q = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        calls[DTYPE_NAMES[dtype]] = partial(torch.matmul, P, Q)
    ms = {name: statistics.median(samples) for name, samples in interleaved(calls, clock, rounds).items()}
    gbps = 2 * copy_bytes / ms.pop("copy") / 1e6
    return Ceilings({name: 2 * side**3 / elapsed / 1e9 for name, elapsed in ms.items()}, gbps)


def ceiling_rows(ceilings: Ceilings, side: int) -> list[Row]:
    """The ceilings as rows "ceiling", so that a table of rows holds all that its figures need."""
    rates = ceilings.tflops.items()
    rows = [_row("matmul", dtype, side, 2 * side**3 / tflops / 1e9, tflops, None) for dtype, tflops in rates]
    return [*rows, _row("copy", "fp32", 0, 2**30 / ceilings.gbps / 1e6, None, ceilings.gbps)]


def ceilings_of(rows: Iterable[Record]) -> Ceilings | None:
    """The ceilings that the rows hold, or None."""
    tflops: dict[str, float] = {}
    gbps = None
    for row in rows:
        if row["op"] == "ceiling" and row["mode"] == "matmul":
            tflops[row["dtype"]] = row["tflops"]
        elif row["op"] == "ceiling":
            gbps = row["gbps"]
    return None if gbps is None or not tflops else Ceilings(tflops, gbps)


def _row(what: str, dtype: str, side: int, ms: float, tflops: float | None, gbps: float | None) -> Row:
    return Row(
        "ceiling", what, dtype, "dense", side, side, side, 0, 1, 0.0, "", "library", ms, ms, ms, tflops, gbps,
        None, None, None, None,
    )  # fmt: skip
