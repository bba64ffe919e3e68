"""Every kernel in every configuration that the default choice can make: what the compile matrix compiles.

A case launches its kernel through the launcher users reach, on uninitialised tensors of a real layer's shape, so that
argument specialisation (divisibility, strides of one, absent pointers) is the one that ships.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_kernels.kernels.chip import CHIPS
from lora_kernels.kernels.common import Dropout
from lora_kernels.kernels.expand import expand_add_
from lora_kernels.kernels.lora_linear import extend, one_pass
from lora_kernels.kernels.lora_linear_bwd import da, dx_da, dyb_db
from lora_kernels.kernels.shrink import shrink
from lora_kernels.kernels.tuning import Config, gemm_config, shrink_config, split_config

N = K = 4096
ROWS = (1, 64, 8192)  # decode, a small batch, training: each has tiles of its own
RANKS = (16, 64)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Case:
    """One kernel launch: what it is, the configuration it takes, and ``launch()`` to make it."""

    label: str
    dtype: torch.dtype
    config: Config
    launch: Callable[[], object]


def shipped_cases(arch: str) -> Iterator[Case]:
    """The cases of one architecture, for example "sm_90"; each (kernel, configuration, dtype, variant) once."""
    chip = CHIPS[arch]
    seen: set[tuple[object, ...]] = set()

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype)

    for dtype in DTYPES:
        for M in ROWS:
            for r in RANKS:
                X, dY = empty(M, K, dtype=dtype), empty(M, N, dtype=dtype)
                W, bias = empty(N, K, dtype=dtype), empty(N, dtype=dtype)
                A, B = empty(r, K, dtype=torch.float32), empty(N, r, dtype=torch.float32)
                S = empty(M, r, dtype=dtype)
                tiles = gemm_config(M, N, dtype, chip)
                split = split_config(M, dtype, chip, r)
                for drop in (None, Dropout(0.1, torch.empty(2, dtype=torch.int64))):
                    pass_x = shrink_config(M, dtype, chip, drop is not None)
                    name = f"r={r}" + (" dropout" if drop else "")
                    made = [
                        ("shrink", pass_x, lambda X=X, A=A, d=drop, c=pass_x: shrink(X, A, 2.0, d, c)),
                        (
                            "one_pass",
                            tiles,
                            lambda X=X, W=W, A=A, B=B, b=bias, d=drop, c=tiles: one_pass(X, W, A, B, b, 2.0, d, c),
                        ),
                        (
                            "dx_da",
                            tiles,
                            lambda Y=dY, W=W, S=S, A=A, X=X, d=drop, c=tiles: dx_da(Y, W, S, A, X, d, c),
                        ),
                        ("da", split, lambda S=S, X=X, d=drop, A=A, c=split: da(S, X, d, A.dtype, c)),
                    ]
                    if drop:
                        made += [("expand", tiles, lambda X=X, S=S, A=A, d=drop, c=tiles: expand_add_(X, S, A, d, c))]
                    else:
                        made += [
                            ("extend", tiles, lambda X=X, W=W, S=S, B=B, b=bias, c=tiles: extend(X, W, S, B, b, c)),
                            (
                                "dyb_db",
                                split,
                                lambda Y=dY, B=B, S=S, c=split: dyb_db(Y, B, S, 2.0, c, make_dbias=True),
                            ),
                        ]
                    for kernel, config, launch in made:
                        key = (kernel, config, dtype, r, drop is None)
                        if key not in seen:
                            seen.add(key)
                            yield Case(f"{kernel} {name}", dtype, config, launch)
