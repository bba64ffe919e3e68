"""Serving cases: layers of served models, decode and prefill batches, adapters and who uses which.

Beside the layers of benchmarks.cases.MODELS those of TinyLlama 1.1B. Ranks are 16 for all or "8-64", eight in turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.cases import MODELS
from lora_kernels.check.serving.cases import ServingCase, ranks_from

LAYERS = {name: MODELS[name] for name in ("bert-base", "llama-3-8b")} | {
    "tinyllama-1.1b": {"q,o": (2048, 2048), "k,v": (256, 2048), "gate,up": (5632, 2048), "down": (2048, 5632)}
}
BIASED = ("bert-base",)
SQUARE = (4096, 4096)


def served(
    M: int,
    layer: tuple[int, int] = SQUARE,
    L: int = 8,
    distribution: str = "uniform",
    ranks: str = "16",
    sequence: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
) -> ServingCase:
    """A case by the ranks' name."""
    return ServingCase(M, *layer, ranks_from(ranks, L), distribution, sequence, dtype, bias)


@dataclass(frozen=True)
class ServingTarget:
    """What ``case`` must reach and should reach, as a ratio to the frozen layer's time in ``mode``."""

    mode: str
    case: ServingCase
    must: float
    aim: float


_EIGHT = served(32, L=8, distribution="distinct")
TARGETS = (
    ServingTarget("fwd_graph", served(1, L=1, distribution="identical"), 1.08, 1.03),
    ServingTarget("fwd_graph", served(16, L=1, distribution="identical"), 1.08, 1.03),
    ServingTarget("fwd_graph", _EIGHT, 1.15, _EIGHT.floor + 0.05),
    ServingTarget("fwd_graph", served(16, distribution="none"), 1.01, 1.005),
    ServingTarget("fwd", served(2048, L=8, sequence=128, ranks="8-64"), 1.06, 1.03),
    ServingTarget("fwd", served(8192, L=8, sequence=512, ranks="8-64"), 1.06, 1.03),
)
DECODE = (
    *(target.case for target in TARGETS if target.mode == "fwd_graph"),
    served(32, L=32, distribution="distinct"),
    served(64, L=32, ranks="8-64", distribution="skewed"),
    served(64, ranks="8-64"),
    served(16, ranks="8-64", distribution="half"),
    *(served(16, layer, ranks="8-64") for layer in LAYERS["llama-3-8b"].values() if layer != SQUARE),
    *(served(16, layer, ranks="8-64") for layer in LAYERS["tinyllama-1.1b"].values()),
)
PREFILL = (
    *(target.case for target in TARGETS if target.mode == "fwd"),
    served(512, ranks="8-64", sequence=64),
    served(4096, L=32, ranks="8-64", sequence=128, distribution="skewed"),
    *(served(4096, layer, ranks="8-64", sequence=128) for layer in LAYERS["llama-3-8b"].values() if layer != SQUARE),
)
CHECKED = (  # small, with odd edges, for the error rule in every dtype
    served(1, (512, 384), 1, "identical"),
    served(37, (200, 136), 8, "skewed", "3,8,17,64", bias=True),
    served(64, (1024, 512), 8, "half", "8-64"),
    served(64, (512, 4096), 32, "distinct", "8-64"),
    served(16, (520, 392), 8, "none"),
    served(300, (264, 392), 5, "uniform", "5,64,16", 16, bias=True),
    served(1000, (1024, 768), 8, "skewed", "8-64", 50),
)
REPLAYED = served(64, (1024, 1024), 8, "uniform", "8-64")
SANITIZED = served(17, (136, 72), 3, "uniform", "4,9,16", bias=True)
PEFT_LIMIT = 0.5  # of PEFT's time with adapter_names: mixed batches of 64 sequences of BERT-base on a CPU


def cpu_cases(
    dtype: torch.dtype, tokens: Sequence[int], ranks: Sequence[str] = ("16", "8-64"), L: int = 8
) -> Iterator[ServingCase]:
    """64 sequences of each of ``tokens`` rows through BERT-base's layers, L adapters drawn at random."""
    for rows in tokens:
        for layer in LAYERS["bert-base"].values():
            for each in ranks:
                yield served(64 * rows, layer, L, "uniform", each, rows, dtype, bias=True)


def other_mixes(dtype: torch.dtype) -> Iterator[ServingCase]:
    """BERT-base's attention with one token of each of 64 sequences: other distributions, 1 and 32 adapters."""
    given = served(64, LAYERS["bert-base"]["attention"], 8, "uniform", "8-64", 1, dtype, bias=True)
    for distribution in ("distinct", "skewed", "identical", "half", "none"):
        yield replace(given, distribution=distribution)
    for L in (1, 32):
        yield replace(given, ranks=ranks_from("8-64" if L > 1 else "16", L))


def tiny(case: ServingCase) -> ServingCase:
    """A case of the same kind that an interpreter runs in milliseconds."""
    few = tuple(max(2, r // 8) for r in case.ranks[:4])
    M = min(case.M, 9) if case.phase == "decode" else 70
    return replace(case, M=M, N=88 if case.N > case.K else 80, K=64, ranks=few, sequence=min(case.sequence, 16))
