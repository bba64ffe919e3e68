"""Mixed batches: which adapter each row uses, a layer with several adapters, and its answers row by row.

The oracle here gathers every row's own A and B and never brings rows together, so it shares no step with the
implementations that it judges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.operands.slots import Slots
from lora_kernels.testing.problems import Magnitudes, lora_dtype

DISTRIBUTIONS = ("distinct", "uniform", "skewed", "identical", "none", "half")


def mix_ids(
    distribution: str, M: int, L: int, *, run: int = 1, seed: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """int32 (M,): the slot of each row, 0 to L - 1 or -1, the same for the same arguments.

    distinct: 0, 1, .., L - 1 in turn; uniform: any slot; skewed: slot l with weight 1 / (l + 1); identical: slot 0;
    none: -1; half: every second run -1, the others uniform. ``run`` neighbours share a slot (tokens of a sequence).
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution {distribution!r}; accepted are {', '.join(DISTRIBUTIONS)}")
    generator = torch.Generator().manual_seed(seed)
    runs = -(-M // run)
    uniform = torch.randint(0, max(L, 1), (runs,), generator=generator)
    turn = torch.arange(runs)
    ids = {
        "distinct": turn % max(L, 1),
        "uniform": uniform,
        "skewed": torch.multinomial(1 / torch.arange(1, max(L, 1) + 1), max(runs, 1), True, generator=generator)[:runs],
        "identical": torch.zeros(runs, dtype=torch.int64),
        "none": torch.full((runs,), -1),
        "half": torch.where(turn % 2 == 0, uniform, -1),
    }[distribution]
    return ids.repeat_interleave(run)[:M].to(device, torch.int32)


@dataclass(frozen=True)
class MultiProblem:
    """One layer with several adapters: X (M,K), W (N,K), bias (N,) or None, dY (M,N), slots, and ids int32 (M,)."""

    X: Tensor
    W: Tensor
    bias: Tensor | None
    dY: Tensor
    slots: Slots
    ids: Tensor


class MultiResults(NamedTuple):
    """Y (M,N), dX (M,K), dA (R,K), dB (N,R), dbias (N,) or None."""

    Y: Tensor
    dX: Tensor
    dA: Tensor
    dB: Tensor
    dbias: Tensor | None


def make_multi_problem(
    ids: Tensor,
    N: int,
    K: int,
    ranks: Sequence[int],
    dtype: torch.dtype,
    *,
    bias: bool = True,
    adapter_dtype: torch.dtype | None = None,
    pool_layout: bool = False,
    gap: int = 0,
    seed: int = 0,
    lora_scale: float = 1.0,
    magnitudes: Magnitudes | None = None,
) -> MultiProblem:
    """Draws a layer for the rows that ``ids`` (M,) names, on its device; the LoRA term is as large as the base term.

    Args:
        ranks: of each slot; 0 leaves a slot empty.
        pool_layout: slots lie in reverse order with ``gap`` rows of NaN before each, B is a transposed (R, N), and the
            starts are data of the problem; else they are packed in order.
        lora_scale: RMS of every slot's LoRA term over that of the base term.
        magnitudes: sizes of A, B and dY, and of every scaling. A given B makes the LoRA term as small as it is.
    """
    sizes = magnitudes or Magnitudes("usual")
    generator = torch.Generator().manual_seed(seed)
    device, M, L = ids.device, ids.shape[0], len(ranks)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    X, W, dY = normal(M, K), normal(N, K, std=K**-0.5), normal(M, N, std=sizes.dY or 1.0)
    bias_values, std_A = normal(N) if bias else None, sizes.A or K**-0.5
    scalings = [sizes.scaling / (1 + slot % 3) for slot in range(L)]  # not exact in 16 bits
    order = list(reversed(range(L))) if pool_layout else list(range(L))
    starts, total = [0] * L, 0
    for slot in order:
        total += gap if pool_layout else 0
        starts[slot], total = total, total + ranks[slot]
    A, B = torch.full((total, K), float("nan")), torch.full((N, total), float("nan"))
    for slot, (first, r) in enumerate(zip(starts, ranks, strict=True)):
        A[first : first + r] = normal(r, K, std=std_A)
        std_B = lora_scale / (scalings[slot] * std_A * (K * max(r, 1)) ** 0.5)
        B[:, first : first + r] = normal(N, r, std=sizes.B or std_B)
    adapters_in = adapter_dtype or dtype
    A, B = A.to(device, adapters_in), B.to(device, adapters_in)
    slots = Slots(
        A,
        B.t().contiguous().t() if pool_layout else B,
        torch.tensor(starts, dtype=torch.int32, device=device),
        torch.tensor(ranks, dtype=torch.int32, device=device),
        torch.tensor(scalings, dtype=torch.float32, device=device),
        max(ranks, default=0),
    )
    return MultiProblem(
        X.to(device, dtype),
        W.to(device, dtype),
        None if bias_values is None else bias_values.to(device, dtype),
        dY.to(device, dtype),
        slots,
        ids,
    )


def multi_truth(problem: MultiProblem) -> MultiResults:
    """The results in float64, every row with its own adapter gathered beside it, by autograd."""
    return _differentiate(problem, torch.float64)


def multi_plain(problem: MultiProblem) -> MultiResults:
    """The result of plain PyTorch in the problem's dtype, row by row, for A and B in lora_dtype, as in PEFT."""
    return _differentiate(problem, problem.X.dtype)


def _differentiate(problem: MultiProblem, dtype: torch.dtype) -> MultiResults:
    slots, ids = problem.slots, problem.ids.long()
    adapters_in = torch.float64 if dtype == torch.float64 else slots.A.dtype
    branch = lora_dtype(dtype, adapters_in)

    def leaf(values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.detach().to(dtype, copy=True).requires_grad_()

    X, A, B = leaf(problem.X, dtype), leaf(slots.A, adapters_in), leaf(slots.B, adapters_in)
    bias = None if problem.bias is None else leaf(problem.bias, dtype)
    Y = F.linear(X, problem.W.detach().to(dtype), bias)
    L, R = len(slots.ranks), A.shape[0]
    if L and R and slots.max_rank and X.shape[0]:
        known = (ids >= 0) & (ids < L)
        slot = torch.where(known, ids, 0)
        place = torch.arange(slots.max_rank, device=ids.device)
        own = known[:, None] & (place < slots.ranks[slot, None])  # (M, max_rank): the ranks that a row has
        rows = torch.where(own, slots.starts[slot, None] + place, 0)
        As = torch.where(own[..., None], A.to(branch)[rows], 0)  # (M, max_rank, K)
        Bs = torch.where(own[..., None], B.to(branch).t()[rows], 0)  # (M, max_rank, N)
        update = ((X[:, None].to(branch) @ As.mT) @ Bs)[:, 0]
        Y = (Y + torch.where(known, slots.scalings[slot], 0.0).to(branch)[:, None] * update).to(dtype)
    Y.backward(problem.dY.to(dtype))
    dX, dA, dB = (leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in (X, A, B))
    return MultiResults(Y.detach(), dX, dA, dB, None if bias is None else bias.grad)


class MultiCase(NamedTuple):
    """The arguments of one fuzzed mixed batch."""

    M: int
    N: int
    K: int
    ranks: tuple[int, ...]
    distribution: str
    run: int
    dtype: torch.dtype
    bias: bool
    pool_layout: bool
    seed: int


def fuzz_mixes(n: int, seed: int = 0, max_M: int = 80, max_r: int = 64) -> Iterator[MultiCase]:
    """n mixed batches, the same for the same seed, leaning towards edges of tiles and towards slots that are empty."""
    generator = torch.Generator().manual_seed(seed)

    def pick(options: Sequence[int]) -> int:
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    def size(limit: int = 80) -> int:
        edges = [e for e in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65) if e <= limit]
        return pick(edges) if pick(range(5)) < 3 else 1 + pick(range(limit))

    ranks = [r for r in (0, 1, 2, 3, 4, 5, 8, 8, 11, 16, 16, 17, 32, 33, 64, 70) if r <= max_r]
    for number in range(n):
        yield MultiCase(
            M=size(max_M),
            N=size(),
            K=size(),
            ranks=tuple(pick(ranks) for _ in range(pick(range(1, 10)))),
            distribution=DISTRIBUTIONS[pick(range(len(DISTRIBUTIONS)))],
            run=pick((1, 1, 2, 5, 16)),
            dtype=(torch.float16, torch.bfloat16, torch.float32)[pick(range(3))],
            bias=bool(pick(range(2))),
            pool_layout=bool(pick(range(2))),
            seed=seed * 10_000 + number,
        )


def problem_of(case: MultiCase) -> MultiProblem:
    """The problem of a fuzzed case."""
    ids = mix_ids(case.distribution, case.M, len(case.ranks), run=case.run, seed=case.seed)
    return make_multi_problem(
        ids, case.N, case.K, case.ranks, case.dtype, bias=case.bias, pool_layout=case.pool_layout, gap=2, seed=case.seed
    )
