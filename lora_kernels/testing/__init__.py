"""Tools that judge a kernel: problems, the error rule, poisoned memory, the strict interpreter, the dry GPU.

Shipped with the package, because users verify on their own GPU. `interpreter` and `dry_gpu` need Triton and are
imported by name; the rest needs PyTorch alone.
"""

from lora_kernels.testing.poison import poison
from lora_kernels.testing.problems import (
    MAGNITUDES,
    REGIMES,
    FuzzCase,
    Magnitudes,
    Problem,
    Regime,
    Results,
    fuzz_problems,
    make_problem,
    plain,
    truth,
)
from lora_kernels.testing.rule import Pool, Verdict, assert_close, within_rule

__all__ = [
    "MAGNITUDES",
    "REGIMES",
    "FuzzCase",
    "Magnitudes",
    "Pool",
    "Problem",
    "Regime",
    "Results",
    "Verdict",
    "assert_close",
    "fuzz_problems",
    "make_problem",
    "plain",
    "poison",
    "truth",
    "within_rule",
]
