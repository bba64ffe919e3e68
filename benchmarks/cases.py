"""The one source of cases: layer shapes of real models, the target table, and the shapes a GPU round checks.

benchmarks.run, the pytest-benchmark tests and the GPU round all take theirs from here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

MODELS = {  # (N, K) of every linear layer that "all-linear" reaches, by kind of layer
    "smollm2-135m": {"q,o": (576, 576), "k,v": (192, 576), "gate,up": (1536, 576), "down": (576, 1536)},
    "qwen2.5-0.5b": {"q,o": (896, 896), "k,v": (128, 896), "gate,up": (4864, 896), "down": (896, 4864)},
    "bert-base": {"attention": (768, 768), "intermediate": (3072, 768), "output": (768, 3072)},
    "llama-3-8b": {"q,o": (4096, 4096), "k,v": (1024, 4096), "gate,up": (14336, 4096), "down": (4096, 14336)},
    "llama-3-70b": {"q,o": (8192, 8192), "k,v": (1024, 8192), "gate,up": (28672, 8192), "down": (8192, 28672)},
    "qwen2.5-7b": {"q,o": (3584, 3584), "k,v": (512, 3584), "gate,up": (18944, 3584), "down": (3584, 18944)},
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


OPS = ("lora_linear", "lora_linear_stacked", "lora_mlp")


@dataclass(frozen=True)
class Case:
    """One operator to measure or check: X (M, K), rank r, dropout p.

    ``op``: lora_linear with W (N, K); lora_linear_stacked with a W (n, K) for each n of ``parts``, N their sum;
    lora_mlp with gate and up (N, K) and down (K, N).
    """

    M: int
    N: int
    K: int
    r: int
    p: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    strided: bool = False
    fp32_adapters: bool = False
    parts: tuple[int, ...] = ()
    op: str = "lora_linear"

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(N, K) of each frozen weight."""
        if self.op == "lora_mlp":
            return (self.N, self.K), (self.N, self.K), (self.K, self.N)
        return tuple((n, self.K) for n in self.parts or (self.N,))

    @property
    def N_shown(self) -> int | str:
        """N as rows print it: "4096+1024+1024" of several projections."""
        return "+".join(map(str, self.parts)) if self.parts else self.N

    def __str__(self) -> str:
        head = "" if self.op == "lora_linear" else f"{self.op} "
        tail = (" strided" if self.strided else "") + (" fp32-adapters" if self.fp32_adapters else "")
        return f"{head}M{self.M} N{self.N_shown} K{self.K} r{self.r} p{self.p:g} {DTYPE_NAMES[self.dtype]}{tail}"


def stacked(
    M: int, parts: tuple[int, ...], K: int, r: int, p: float = 0.0, dtype: torch.dtype = torch.bfloat16
) -> Case:
    """Several projections of one X."""
    return Case(M, sum(parts), K, r, p, dtype, parts=parts, op="lora_linear_stacked")


def mlp(M: int, N: int, K: int, r: int, p: float = 0.0, dtype: torch.dtype = torch.bfloat16) -> Case:
    """down(silu(gate(X)) * up(X)) of inner width N."""
    return Case(M, N, K, r, p, dtype, op="lora_mlp")


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
BLOCKS = (  # Llama-3 8B: q,k,v and gate,up as one operator each, then the whole MLP
    *(stacked(8192, parts, 4096, 16, p) for p in (0.0, 0.1) for parts in ((4096, 1024, 1024), (14336, 14336))),
    *(mlp(8192, 14336, 4096, 16, p) for p in (0.0, 0.1)),
)
RANKS = tuple(Case(8192, 4096, 4096, r) for r in (8, 32, 128))
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


CHECKED_BLOCKS = (
    stacked(512, (512, 256, 256), 512, 16),
    stacked(129, (129, 65), 72, 8),
    stacked(2048, (4096, 1024, 1024), 4096, 16),
    mlp(512, 768, 512, 16),
    mlp(129, 136, 72, 8),
)


def tiny(case: Case) -> Case:
    """A case of the same kind that an interpreter runs in milliseconds: few rows or more, rank one tile or more.

    K is a multiple of 8: elsewhere PyTorch's bf16 product on a CPU multiplies what lies behind a padded row by zero,
    and behind the rows of a strided problem lies NaN.
    """
    M, r = (2 if case.M <= 16 else 33), (5 if case.r <= 16 else 18 if case.r <= 64 else 66)
    parts = ((40, 24, 24) if len(set(case.parts)) > 1 else (24,) * len(case.parts))[: len(case.parts)]
    N = sum(parts) or (88 if case.N > case.K else 80)
    return replace(case, M=M, N=N, K=64 if case.K % 64 == 0 else 72, r=r, parts=parts)


def case_of(row: Mapping[str, Any]) -> Case:
    """The case of a result row."""
    parts = tuple(int(n) for n in str(row["N"]).split("+")) if "+" in str(row["N"]) else ()
    N = sum(parts) or int(row["N"])
    op = row["op"] if row["op"] in OPS else "lora_linear"
    return Case(row["M"], N, row["K"], row["r"], row["dropout"], DTYPES[row["dtype"]], parts=parts, op=op)


def distinct(cases: Iterable[Case]) -> list[Case]:
    """The cases without repetitions, in their order."""
    return list(dict.fromkeys(cases))


def parse(text: str, dtype: torch.dtype, p: float, tokens: int, r: int, op: str = "lora_linear") -> list[Case]:
    """Cases from a model's name (every layer of it, ``tokens`` rows, rank ``r``) or from "M,N,K,r;M,N,K,r".

    For lora_linear_stacked N is "4096+1024+1024", for lora_mlp the inner width.

    Raises:
        ValueError: neither, or a model without such a block.
    """
    if text in MODELS:
        return _of_model(text, dtype, p, tokens, r, op)
    size = r"[1-9]\d*(\+[1-9]\d*)+" if op == "lora_linear_stacked" else r"[1-9]\d*"
    cases = []
    for part in text.split(";"):
        if not re.fullmatch(rf"[1-9]\d*,{size},[1-9]\d*,[1-9]\d*", part.replace(" ", "")):
            wanted = "M,N+N,K,r" if op == "lora_linear_stacked" else "M,N,K,r"
            raise ValueError(f"{part!r} is no shape; accepted are {wanted};{wanted};... or one of {', '.join(MODELS)}")
        M, N, K, rank = part.replace(" ", "").split(",")
        parts = tuple(int(n) for n in N.split("+")) if "+" in N else ()
        cases.append(Case(int(M), sum(parts) or int(N), int(K), int(rank), p, dtype, parts=parts, op=op))
    return cases


def _of_model(name: str, dtype: torch.dtype, p: float, tokens: int, r: int, op: str) -> list[Case]:
    layers = MODELS[name]
    if op == "lora_linear":
        return [Case(tokens, N, K, r, p, dtype) for N, K in layers.values()]
    gated = layers.get("gate,up")
    if op == "lora_mlp":
        if gated is None:
            raise ValueError(
                f"{name} has no gated MLP; accepted are {', '.join(m for m, of in MODELS.items() if 'gate,up' in of)}"
            )
        return [mlp(tokens, *gated, r, p, dtype)]
    N, K = layers.get("q,o") or layers["attention"]
    narrow = layers.get("k,v", (N, K))[0]
    blocks = [stacked(tokens, (N, narrow, narrow), K, r, p, dtype)]
    return blocks + ([stacked(tokens, (gated[0], gated[0]), gated[1], r, p, dtype)] if gated else [])
