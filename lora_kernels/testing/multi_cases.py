"""Mixed batches that kernels are judged on, and the products of rows with their own adapters, row by row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.operands.slots import Slots
from lora_kernels.testing.multi import MultiProblem, make_multi_problem, mix_ids
from lora_kernels.testing.problems import in_layout

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class MultiRegime(NamedTuple):
    """A mixed batch that stands for many: rows in runs of ``run``, the rank of each slot, and how it lies in memory.

    ``strided``: X and A have padded rows, W and B are transposed in memory, dY has a gap after every element; gaps
    hold NaN. ``options``: of make_multi_problem.
    """

    name: str
    dtype: torch.dtype
    M: int
    N: int
    K: int
    ranks: tuple[int, ...]
    distribution: str = "uniform"
    run: int = 1
    strided: bool = False
    options: dict[str, Any] = {}  # noqa: RUF012  (read only)

    def problem(self, device: torch.device | str = "cpu") -> MultiProblem:
        """Its tensors."""
        ids = mix_ids(self.distribution, self.M, len(self.ranks), run=self.run, seed=self.M, device=device)
        problem = make_multi_problem(ids, self.N, self.K, self.ranks, self.dtype, seed=self.M, **self.options)
        return apart(problem) if self.strided else problem


POOL = {"pool_layout": True, "gap": 3}
REGIMES = (
    MultiRegime("bf16", BF16, 40, 40, 48, (16, 8, 33, 0, 3)),
    MultiRegime("fp16", FP16, 33, 41, 37, (1, 3, 8, 17, 16, 0, 5), "distinct"),
    MultiRegime("fp32", FP32, 40, 24, 56, (8, 17, 3, 33), "skewed", run=3),
    MultiRegime("identical", BF16, 40, 40, 48, (16, 4), "identical"),
    MultiRegime("none", FP16, 20, 24, 32, (8, 4), "none"),
    MultiRegime("half", BF16, 35, 33, 65, (64, 16, 1), "half", run=5),
    MultiRegime("skewed", FP16, 33, 17, 31, (8, 3, 16, 1, 0, 2, 8, 8, 1), "skewed"),
    MultiRegime("rank 70", BF16, 40, 40, 40, (70, 8)),
    MultiRegime("rank 150", FP16, 33, 24, 40, (17, 150, 64)),
    MultiRegime("rank 150 fp32", FP32, 9, 17, 24, (150, 1), "distinct"),
    MultiRegime("one row", BF16, 1, 40, 48, (8,)),
    MultiRegime("one column", FP32, 19, 1, 1, (1, 0, 2)),
    MultiRegime("pool", BF16, 37, 53, 71, (8, 0, 17, 1), "uniform", 2, options=POOL),
    MultiRegime("pool fp32", FP32, 37, 23, 31, (8, 0, 17, 1), "half", options={**POOL, "bias": False}),
    MultiRegime("float32 adapters", BF16, 32, 32, 64, (8, 16), options={"adapter_dtype": FP32}),
    MultiRegime("float32 pool", FP16, 33, 40, 24, (8, 1, 16), options={**POOL, "adapter_dtype": FP32, "bias": False}),
    MultiRegime("strided", BF16, 37, 53, 71, (8, 5, 17), strided=True),
    MultiRegime("strided fp32", FP32, 37, 53, 31, (8, 5), strided=True),
    MultiRegime("no adapter at all", BF16, 17, 24, 32, (0, 0)),
)


def apart(problem: MultiProblem) -> MultiProblem:
    """The same values in views that are nowhere contiguous; what lies between them is NaN."""
    slots = problem.slots
    return replace(
        problem,
        X=in_layout(problem.X, "padded"),
        W=in_layout(problem.W, "transposed"),
        bias=None if problem.bias is None else in_layout(problem.bias, "spaced"),
        dY=in_layout(problem.dY, "spaced"),
        slots=slots._replace(A=in_layout(slots.A, "padded"), B=in_layout(slots.B, "transposed")),
    )


def far_apart(matrix: Tensor, rows: bool = True) -> Tensor:
    """The same values, rows (or columns) 2**30 elements apart in memory that is reserved, not touched."""
    (M, C), far = matrix.shape, 2**30
    strides = (far, 1) if rows else (1, far)
    last = (M if rows else C) - 1
    memory = torch.empty(last * far + (C if rows else M), dtype=matrix.dtype, device=matrix.device)
    return memory.as_strided((M, C), strides).copy_(matrix)


def misplaced(problem: MultiProblem) -> tuple[Slots, Slots]:
    """Eight slots that point out of the problem's A and B or name a wild rank, and what they are to mean.

    A slot that starts outside has no adapter; a rank ends with the buffers and with max_rank.
    """
    slots, R = problem.slots, problem.slots.A.shape[0]
    most = min(slots.max_rank, R)
    given = {  # (start, rank): what is meant
        (-1, 8): (0, 0), (R, 8): (0, 0), (2**31 - 1, 8): (0, 0), (-(2**31), 8): (0, 0),
        (R - 2, 1000): (R - 2, min(2, most)), (0, -3): (0, 0), (0, 2**31 - 1): (0, most), (1, -(2**31)): (0, 0),
    }  # fmt: skip
    scalings = slots.scalings.new_tensor([1.7 / (1 + slot % 3) for slot in range(len(given))])

    def of(pairs: list[tuple[int, int]]) -> Slots:
        starts, ranks = (slots.starts.new_tensor(numbers) for numbers in zip(*pairs, strict=True))
        return slots._replace(starts=starts, ranks=ranks, scalings=scalings)

    return of(list(given)), of(list(given.values()))


def multi_shrunk(P: Tensor, Q: Tensor, slots: Slots, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """S (M, max_rank) = s_l P[m] Q_l^T in ``dtype`` with P (M, C), Q (R, C): every row's own Q gathered beside it."""
    known = (ids >= 0) & (ids < len(slots.ranks))
    if not slots.max_rank or not known.any():
        return P.new_zeros(P.shape[0], slots.max_rank, dtype=dtype)
    slot = torch.where(known, ids, 0).long()
    place = torch.arange(slots.max_rank, device=ids.device)
    own = known[:, None] & (place < slots.ranks[slot, None])
    rows = torch.where(own, slots.starts[slot, None] + place, 0)
    gathered = torch.where(own[..., None], Q.to(dtype)[rows], 0)  # (M, max_rank, C)
    products = (P.to(dtype)[:, None] @ gathered.mT)[:, 0]
    return (slots.scalings[slot, None] * products).to(dtype)  # a 16-bit scaling would be rounded
