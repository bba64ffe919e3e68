"""Inputs shared by tests and benchmarks, with fp64 truth and plain PyTorch's answer for each.

The LoRA term of a problem is as large as its base term. With B near zero, as after PEFT's initialisation, every
tolerance accepts a kernel that does no LoRA at all. MAGNITUDES are sizes that 16-bit intermediates cannot hold.
There the gradients show an error: their relative error does not depend on the size of B.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_SAMPLED_ROWS = 256


@dataclass(frozen=True)
class Problem:
    """One LoRA linear: Y = X W^T + bias + scaling * drop(X) A^T B^T, with the gradient dY of its output.

    X (M,K), W (N,K), bias (N,) or None and dY (M,N) share a dtype; A (r,K) and B (N,r) share one, maybe another.
    p is the dropout probability, seed an int64 tensor [seed, offset] on the problem's device.
    """

    X: Tensor
    W: Tensor
    A: Tensor
    B: Tensor
    bias: Tensor | None
    dY: Tensor
    scaling: float
    p: float
    seed: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(M, N, K, r)"""
        return self.X.shape[0], self.W.shape[0], self.X.shape[1], self.A.shape[0]


@dataclass(frozen=True)
class Results:
    """What a forward and backward pass yields: Y (M,N), dX (M,K), dA (r,K), dB (N,r), dbias (N,) or None."""

    Y: Tensor
    dX: Tensor
    dA: Tensor
    dB: Tensor
    dbias: Tensor | None


class Magnitudes(NamedTuple):
    """Sizes of a problem's operands: the RMS of A, B and dY (None: the usual one), and the scaling.

    ``wide``: only for float32 adapters, since A or gradients leave the range of float16.
    """

    name: str
    scaling: float = 1.7
    A: float | None = None
    B: float | None = None
    dY: float | None = None
    wide: bool = False


MAGNITUDES = (
    Magnitudes("small-B", B=1e-4),
    Magnitudes("tiny-B", B=1e-5),
    Magnitudes("tinier-B", B=1e-7, wide=True),
    Magnitudes("large-scaling", scaling=256.0),
    Magnitudes("small-dY", dY=1e-6),
    Magnitudes("large-dY", scaling=256.0, dY=1e3, wide=True),
    Magnitudes("large-A", A=3e5, wide=True),
)


def make_problem(
    M: int,
    N: int,
    K: int,
    r: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    bias: bool = True,
    dropout_p: float = 0.0,
    adapter_dtype: torch.dtype | None = None,
    strided: bool = False,
    seed: int = 0,
    lora_scale: float = 1.0,
    scaling: float = 1.7,
    magnitudes: Magnitudes | None = None,
) -> Problem:
    """Draws a problem; the same arguments give the same values on every device.

    Args:
        adapter_dtype: dtype of A and B; that of X by default.
        strided: every tensor is a non-contiguous view: padded rows (X, A), transposed storage (W, B), every second
            element (bias, dY); gaps hold NaN.
        lora_scale: RMS of the LoRA term over that of the base term.
        scaling: lora_alpha / r. The default is no power of two and not exact in 16 bits, so rounding it shows.
        magnitudes: sizes of A, B and dY and the scaling, in place of ``scaling``. A given B makes the LoRA term as
            small as it is, without one B is as small as a large A or scaling wants it.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    sizes = magnitudes or Magnitudes("usual", scaling)
    scaling = sizes.scaling
    X, W, dY = normal(M, K), normal(N, K, std=K**-0.5), normal(M, N, std=sizes.dY or 1.0)
    A, B = normal(r, K, std=sizes.A or K**-0.5), normal(N, r, std=sizes.B or r**-0.5)
    bias_values = normal(N) if bias else None
    rows = X[:_SAMPLED_ROWS]
    base_term, lora_term = (rows @ W.T).square().mean(), (scaling * (rows @ A.T) @ B.T).square().mean()
    if lora_term > 0 and sizes.B is None:  # 0 if M = 0, or the scaling is 0
        B *= lora_scale * (base_term / lora_term).sqrt()

    def place(values: Tensor, dtype: torch.dtype, layout: str) -> Tensor:
        values = values.to(device, dtype)
        return in_layout(values, layout) if strided else values

    adapter_dtype = adapter_dtype or dtype
    return Problem(
        X=place(X, dtype, "padded"),
        W=place(W, dtype, "transposed"),
        A=place(A, adapter_dtype, "padded"),
        B=place(B, adapter_dtype, "transposed"),
        bias=None if bias_values is None else place(bias_values, dtype, "spaced"),
        dY=place(dY, dtype, "spaced"),
        scaling=scaling,
        p=dropout_p,
        seed=torch.tensor([seed + 1234, 0], dtype=torch.int64, device=device),
    )


def in_layout(values: Tensor, layout: str) -> Tensor:
    """The same values in a NaN-filled buffer: rows "padded", every second element ("spaced"), or "transposed"."""
    if layout == "transposed":
        return values.mT.contiguous().mT
    *rows, columns = values.shape
    width = columns + 5 if layout == "padded" else 2 * columns
    buffer = values.new_full((*rows, width), float("nan"))
    view = buffer[..., :columns] if layout == "padded" else buffer[..., ::2]
    view.copy_(values)
    return view


def truth(problem: Problem, keep: Tensor | None = None) -> Results:
    """The results in float64, by autograd. keep (M,K) bool is the dropout mask; None means no dropout."""
    return _differentiate(problem, keep, torch.float64)


def plain(problem: Problem, keep: Tensor | None = None) -> Results:
    """The result of plain PyTorch in the problem's own dtype.

    A and B are cast to X's dtype, as in PEFT under autocast. Exception: for float32 A and B and a float16 X, X is cast
    to float32, as in PEFT without autocast. In bfloat16, which has float32's range, both ways are equally good.
    """
    return _differentiate(problem, keep, problem.X.dtype)


def lora_dtype(dtype: torch.dtype, adapter_dtype: torch.dtype) -> torch.dtype:
    """The dtype of plain's LoRA term for X in ``dtype``: the same, but float32 for float32 adapters and float16 X."""
    return adapter_dtype if dtype == torch.float16 and adapter_dtype == torch.float32 else dtype


def _differentiate(problem: Problem, keep: Tensor | None, dtype: torch.dtype) -> Results:
    adapters_in = torch.float64 if dtype == torch.float64 else problem.A.dtype

    def leaf(values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.detach().to(dtype, copy=True).requires_grad_()

    X, A, B = leaf(problem.X, dtype), leaf(problem.A, adapters_in), leaf(problem.B, adapters_in)
    bias = None if problem.bias is None else leaf(problem.bias, dtype)
    dropped = X if keep is None else torch.where(keep, X * (1 / (1 - problem.p)), 0)
    base_term = F.linear(X, problem.W.detach().to(dtype), bias)
    branch = lora_dtype(dtype, adapters_in)
    low = F.linear(F.linear(dropped.to(branch), A.to(branch)), B.to(branch))
    Y = (base_term + problem.scaling * low).to(dtype)
    Y.backward(problem.dY.to(dtype))
    gradients = [leaf.grad if leaf is not None else None for leaf in (X, A, B, bias)]
    return Results(Y.detach(), *gradients)  # type: ignore[arg-type]  # a leaf's gradient is set by backward


class Regime(NamedTuple):
    """A named shape that tests run every kernel on."""

    name: str
    M: int
    N: int
    K: int
    r: int
    strided: bool = False


REGIMES = (
    Regime("one-row", 1, 64, 48, 8),
    Regime("full-tile", 128, 128, 64, 16),
    Regime("tile-plus-one", 129, 129, 65, 16),
    Regime("primes", 37, 53, 71, 8),
    Regime("r1", 33, 40, 48, 1),
    Regime("r17", 33, 40, 48, 17),
    Regime("r64", 40, 72, 80, 64),
    Regime("one-column", 19, 1, 1, 1),
    Regime("strided", 37, 53, 71, 8, strided=True),
    Regime("no-rows", 0, 32, 32, 8),
)


class FuzzCase(NamedTuple):
    """The arguments of one fuzzed problem."""

    M: int
    N: int
    K: int
    r: int
    dtype: torch.dtype
    p: float
    bias: bool
    strided: bool


def fuzz_problems(n: int, seed: int = 0) -> Iterator[FuzzCase]:
    """n cases, the same for the same seed, leaning towards edges of tiles: 1, powers of two and their neighbours."""
    rng = random.Random(seed)
    edges = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65]

    def size() -> int:
        return rng.choice(edges) if rng.random() < 0.6 else rng.randint(1, 80)

    for _ in range(n):
        yield FuzzCase(
            M=0 if rng.random() < 0.01 else size(),
            N=size(),
            K=size(),
            r=rng.choice([1, 2, 3, 4, 5, 8, 11, 16, 17, 32, 33, 64]),
            dtype=rng.choice([torch.float16, torch.bfloat16, torch.float32]),
            p=rng.choice([0.0, 0.0, 0.1, 0.5]),
            bias=rng.random() < 0.5,
            strided=rng.random() < 0.25,
        )
