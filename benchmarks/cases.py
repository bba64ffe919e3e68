"""The one source of cases: layer shapes of real models, the target table, and the shapes a GPU round checks."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

MODELS = {  # (N, K) of every linear layer that "all-linear" reaches, by kind of layer
    "bert-base": {"attention": (768, 768), "intermediate": (3072, 768), "output": (768, 3072)},
    "llama-3-8b": {"q,o": (4096, 4096), "k,v": (1024, 4096), "gate,up": (14336, 4096), "down": (4096, 14336)},
    "llama-3-70b": {"q,o": (8192, 8192), "k,v": (1024, 8192), "gate,up": (28672, 8192), "down": (8192, 28672)},
    "qwen2.5-7b": {"q,o": (3584, 3584), "k,v": (512, 3584), "gate,up": (18944, 3584), "down": (3584, 18944)},
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Case:
    """One LoRA linear to measure or check: X (M, K), W (N, K), rank r, dropout p."""

    M: int
    N: int
    K: int
    r: int
    p: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    strided: bool = False
    fp32_adapters: bool = False

    def __str__(self) -> str:
        tail = (" strided" if self.strided else "") + (" fp32-adapters" if self.fp32_adapters else "")
        return f"M{self.M} N{self.N} K{self.K} r{self.r} p{self.p:g} {DTYPE_NAMES[self.dtype]}{tail}"


@dataclass(frozen=True)
class Target:
    """What ``case`` must reach and should reach in ``mode``, as a ratio to the frozen layer's time."""

    mode: str
    case: Case
    must: float
    aim: float


_Q = Case(8192, 4096, 4096, 16)
_UP = Case(8192, 14336, 4096, 16)
_WIDE_RANK = Case(8192, 4096, 4096, 64)

TARGETS = (
    Target("fwd", _Q, 1.08, 1.03),
    Target("fwd_bwd", _Q, 1.10, 1.05),
    Target("fwd_bwd", replace(_Q, p=0.1), 1.11, 1.06),
    Target("fwd_bwd", _UP, 1.06, 1.03),
    Target("fwd_bwd", _WIDE_RANK, 1.13, 1.08),
)

TARGET_CASES = tuple(replace(case, p=p) for case in (_Q, _UP, _WIDE_RANK) for p in (0.0, 0.1))
FEW_ROWS = tuple(Case(M, 4096, 4096, 16) for M in (1, 16, 64, 512, 2048))
BERT = tuple(Case(4096, N, K, 16, p) for p in (0.0, 0.1) for N, K in MODELS["bert-base"].values())
GRID = tuple(
    Case(M, N, K, 16, 0.1)
    for M in (4096, 8192)
    for model in ("llama-3-8b", "qwen2.5-7b", "llama-3-70b")
    for N, K in MODELS[model].values()
)

# Checked in every dtype with dropout 0 and 0.1. No result has fewer than 64 elements: the error rule judges each alone.
CHECKED = (
    Case(512, 512, 512, 16),
    Case(1000, 768, 1024, 8, fp32_adapters=True),
    Case(640, 1024, 512, 64),
    Case(2048, 4096, 4096, 16),
    Case(1, 4096, 4096, 16),
    Case(129, 129, 65, 16),
    Case(37, 101, 71, 8, strided=True),
    Case(300, 520, 392, 128, fp32_adapters=True),
    Case(64, 3072, 768, 17),
)
SANITIZED = (Case(129, 129, 65, 16), Case(37, 101, 71, 8, strided=True), Case(70, 96, 136, 80))


def checked_cases() -> list[Case]:
    """CHECKED in every dtype, bf16 first, without and with dropout."""
    return [replace(case, dtype=dtype, p=p) for dtype in DTYPES.values() for case in CHECKED for p in (0.0, 0.1)]


def tiny(case: Case) -> Case:
    """A case of the same kind that an interpreter runs in milliseconds: few rows or more, rank one tile or more.

    K is a multiple of 8: elsewhere PyTorch's bf16 product on a CPU multiplies what lies behind a padded row by zero,
    and behind the rows of a strided problem lies NaN.
    """
    M, r = (2 if case.M <= 16 else 33), (5 if case.r <= 16 else 18 if case.r <= 64 else 66)
    return replace(case, M=M, N=88 if case.N > case.K else 80, K=64 if case.K % 64 == 0 else 72, r=r)


def distinct(cases: list[Case]) -> list[Case]:
    """The cases without repetitions, in their order."""
    return list(dict.fromkeys(cases))


def parse(text: str, dtype: torch.dtype, p: float, tokens: int, r: int) -> list[Case]:
    """Cases from a model's name (every layer of it, ``tokens`` rows, rank ``r``) or from "M,N,K,r;M,N,K,r".

    Raises:
        ValueError: neither.
    """
    if text in MODELS:
        return [Case(tokens, N, K, r, p, dtype) for N, K in MODELS[text].values()]
    cases = []
    for part in text.split(";"):
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){3}", part.replace(" ", "")):
            raise ValueError(f"{part!r} is no shape; accepted are M,N,K,r;M,N,K,r;... or one of {', '.join(MODELS)}")
        M, N, K, rank = (int(number) for number in part.split(","))
        cases.append(Case(M, N, K, rank, p, dtype))
    return cases
