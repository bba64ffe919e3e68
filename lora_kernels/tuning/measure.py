"""Measure one CallShape: its candidates, random operands, the error rule, and the times.

Candidates are timed in turns (A B C, B C A, ...), so that drifting clocks, power and temperature affect all of them
equally. Each GPU call starts with a cold L2 cache: a buffer larger than the cache is read before it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels import ops, reference
from lora_kernels.errors import BackendUnavailableError
from lora_kernels.kernels.chip import Chip
from lora_kernels.planning.choose import triton_kernels
from lora_kernels.planning.cost import CallShape, Tiles
from lora_kernels.planning.plans import VARIANTS
from lora_kernels.reference import GradMask
from lora_kernels.testing import Problem as Operands
from lora_kernels.testing import Results, plain, truth, within_rule

Call = Callable[[], tuple[Tensor | None, ...]]
Candidate = tuple[str, Tiles | None]  # a plan, and the tiles of its main product (None: the default ones)
SCALING = 1.7  # not a power of two, so that the check detects a kernel that rounds scaling * B
SWEEP_BYTES = 256 << 20
SWEEP_HOST_US = 20.0  # host time to queue the read that clears L2, and two events


class Times(NamedTuple):
    """Microseconds of one call: on the GPU, and on the host to queue it."""

    us: float
    host_us: float


class Spread(NamedTuple):
    """Times of one call, in the unit of the samples: median, 20th and 80th percentile."""

    p50: float
    p20: float
    p80: float


def candidates(q: CallShape, chip: Chip) -> list[Candidate]:
    """Every plan that can run ``q``, eager first, with its default tiles (None) and variations of them. A plan with the
    same launches as an earlier one is omitted."""
    found: list[Candidate] = []
    seen: set[object] = set()
    for variant in VARIANTS:
        direction = variant.fwd if q.op == "fwd" else variant.bwd
        if direction is None or direction.refused(q, chip) or direction.launches(q) in seen:
            continue
        seen.add(direction.launches(q))
        found.append((variant.name, None))
        if direction.tiles is not None and (q.op == "fwd" or q.need_dx):
            near = variations(direction.tiles(q, chip))
            found += [(variant.name, tiles) for tiles in near if direction.refused(q, chip, tiles) is None]
    return found


def variations(tiles: Tiles) -> list[Tiles]:
    """Variations of the given tiles: wider, narrower, shorter, deeper, and another tile order for L2."""
    depth = "STAGES" if hasattr(tiles, "STAGES") else "num_stages"
    stages = getattr(tiles, depth)
    changes: list[dict[str, int]] = [{depth: stages + 1}]
    if hasattr(tiles, "BLOCK_N"):
        changes += [{"BLOCK_N": 2 * tiles.BLOCK_N}]
        changes += [{"BLOCK_N": tiles.BLOCK_N // 2, depth: stages + 1}] if tiles.BLOCK_N >= 64 else []
        changes += [{"BLOCK_N": tiles.BLOCK_N // 2, depth: stages + 2}] if tiles.BLOCK_N >= 256 else []
    if tiles.BLOCK_M >= 64:
        changes += [{"BLOCK_M": tiles.BLOCK_M // 2, "num_warps": max(4, tiles.num_warps // 2)}]
    if hasattr(tiles, "GROUP_M"):
        changes += [{"GROUP_M": 16}]
    return [replace(tiles, **change) for change in changes]  # type: ignore[arg-type]


def candidate_label(plan: str, tiles: Tiles | None) -> str:
    """Short name of a candidate: "tma_extend M128 N256 K64 num_warps8 num_stages3 GROUP_M16"."""
    fields = {} if tiles is None else asdict(tiles)
    return " ".join([plan, *(f"{name.removeprefix('BLOCK_')}{value}" for name, value in fields.items())])


class TuningRun:
    """A CallShape with random operands on ``device``. The LoRA term is as large as the base term.

    Adapters are float32 beside 16-bit weights, as in LoRALinear.
    """

    def __init__(self, problem: CallShape, device: torch.device, chip: Chip, p: float = 0.1, seed: int = 0) -> None:
        self.problem, self.chip = problem, chip
        self._given = _operands(problem, device, p if problem.dropout else 0.0, seed)
        given, (M, K) = self._given, self._given.X.shape
        self._seed = given.seed if problem.dropout else None
        self._keep = reference.philox_keep_mask(given.seed, p, M, K) if problem.dropout else None
        kept = problem.bits and problem.dropout
        _, self._XA, self._bits = ops.lora_linear_fwd(
            given.X, given.W, given.A, given.B, given.bias, SCALING, p, self._seed, "triton:eager", kept
        )
        self._plain: Results | None = None
        self._truth: Results | None = None

    def call(self, plan: str, tiles: Tiles | None) -> Call:
        """A call of the candidate's launcher: (Y, XA), or (dX, dA, dB, dbias)."""
        g, q, chip, kernels = self._given, self.problem, self.chip, triton_kernels()
        drop = None if self._seed is None else kernels.Dropout(g.p, self._seed, self._bits)
        if q.op == "fwd":
            return lambda: kernels.lora_linear_fwd(g.X, g.W, g.A, g.B, g.bias, SCALING, drop, plan, chip, tiles)
        needs, XA = GradMask(q.need_dx, True, True, q.bias), self._XA
        return lambda: kernels.lora_linear_bwd(g.dY, g.X, g.W, g.A, g.B, XA, SCALING, drop, needs, plan, chip, tiles)

    def fault(self, call: Call) -> str | None:
        """None if every result of the call is finite and passes the error rule; otherwise a description of the fault.

        Raises:
            BackendUnavailableError: the call raised, and the device no longer works.
        """
        try:
            return self._judge(call())
        except Exception as error:  # an error of a compiler or driver must not stop the other candidates
            try:
                if self._given.X.is_cuda:
                    torch.cuda.synchronize(self._given.X.device)
            except RuntimeError as broken:
                reason = f"the device broke down: {broken}; start tune again, it goes on without this candidate"
                raise BackendUnavailableError(reason) from error
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def _judge(self, results: tuple[Tensor | None, ...]) -> str | None:
        if self._truth is None or self._plain is None:
            self._truth, self._plain = truth(self._given, self._keep), plain(self._given, self._keep)
        names = ("Y",) if self.problem.op == "fwd" else ("dX", "dA", "dB", "dbias")
        for name, got in zip(names, results, strict=False):
            if got is not None:
                verdict = within_rule(got, getattr(self._plain, name), getattr(self._truth, name), what=name)
                if not verdict:
                    return verdict.message
        return None

    def forget_truth(self) -> None:
        """Free the float64 results before the timing."""
        self._truth = self._plain = None


def _operands(q: CallShape, device: torch.device, p: float, seed: int) -> Operands:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = q.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype).mul_(std)

    adapters = torch.float32 if q.dtype.itemsize == 2 else q.dtype
    return Operands(
        X=normal(q.M, q.K),
        W=normal(q.N, q.K, std=q.K**-0.5),
        A=normal(q.r, q.K, std=q.K**-0.5, dtype=adapters),
        B=normal(q.N, q.r, std=q.r**-0.5 / SCALING, dtype=adapters),
        bias=normal(q.N) if q.bias else None,
        dY=normal(q.M, q.N),
        scaling=SCALING,
        p=p,
        seed=torch.tensor([seed + 1234, 0], dtype=torch.int64, device=device),
    )


def timed(calls: Mapping[str, Call], device: torch.device, rounds: int) -> dict[str, Times]:
    """Median times of each call over ``rounds`` rounds, taken in turns. On a CPU: host times."""
    names = list(calls)
    taken: dict[str, list[Times]] = {name: [] for name in names}
    sweep = torch.ones(SWEEP_BYTES // 4, device=device) if device.type == "cuda" else torch.ones(1)
    queueing = 0.0
    for number in range(rounds):
        first = number % max(len(names), 1)
        order = names[first:] + names[:first]
        one_round = _cuda_round(calls, order, sweep, queueing) if device.type == "cuda" else _host_round(calls, order)
        for name, times in one_round.items():
            taken[name].append(times)
        queueing = sum(times.host_us + SWEEP_HOST_US for times in one_round.values()) * 1e-6
    return {
        name: Times(statistics.median(t.us for t in samples), statistics.median(t.host_us for t in samples))
        for name, samples in taken.items()
    }


def _cuda_round(calls: Mapping[str, Call], order: list[str], sweep: Tensor, queueing: float) -> dict[str, Times]:
    """Times of one round. The GPU sleeps while the host queues the calls, so that no event waits for the host."""
    torch.cuda.synchronize()
    torch.cuda._sleep(int(min(0.05, 1.5 * queueing) * 2e9))  # cycles, at no more than 2 GHz
    events, hosts = [], []
    for name in order:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        sweep.sum()
        start.record()
        began = time.perf_counter()
        calls[name]()
        hosts.append(1e6 * (time.perf_counter() - began))
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    spans = [1e3 * start.elapsed_time(end) for start, end in events]
    return {name: Times(us, host) for name, us, host in zip(order, spans, hosts, strict=True)}


def _host_round(calls: Mapping[str, Call], order: list[str]) -> dict[str, Times]:
    found = {}
    for name in order:
        began = time.perf_counter()
        calls[name]()
        found[name] = Times(1e6 * (time.perf_counter() - began), 0.0)
    return found


def spread(samples: Sequence[float]) -> Spread:
    """Median, 20th and 80th percentile of at least one sample."""
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0])
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Spread(statistics.median(samples), fifths[0], fifths[3])


def captured(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], object]:
    """One function that makes all calls: the replay of a CUDA graph, or on a CPU one call after another."""
    if device.type != "cuda":
        return lambda: [call() for call in calls]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay
