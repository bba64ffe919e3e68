"""pytest-benchmark over the same cases and contenders as benchmarks.run: ``pytest benchmarks/ --benchmark-only``."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the benchmarks are not installed with the package

import pytest
import torch

from benchmarks.cases import DTYPES, MODELS


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lora_kernels")
    group.addoption("--shapes", help=f"one of {', '.join(MODELS)}, or M,N,K,r;... for lora_linear (default: a subset)")
    group.addoption("--tokens", type=int, help="rows of every case (default 128 on a CPU, 8192 on a GPU)")
    group.addoption("--rank", type=int, default=16, help="rank of every case (default 16)")
    group.addoption("--dtype", choices=list(DTYPES), help="default fp32 on a CPU, bf16 on a GPU")
    group.addoption("--dropout", default="0,0.1", help="probabilities (default 0,0.1)")
    group.addoption("--modes", default="fwd_bwd", help="fwd,fwd_bwd (default fwd_bwd)")
    group.addoption("--device", choices=["cpu", "cuda"], help="default cuda where there is one")


def pytest_configure(config: pytest.Config) -> None:
    if not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # one core: the least noise
