"""What the tests of AdapterPool share: an input, and a pool filled with adapters of given ranks."""

from __future__ import annotations

from typing import Any

import torch

import lora_kernels as lk

X = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(3))


def fill(pool: lk.AdapterPool, adapter: Any, *ranks: int) -> dict[str | None, Any]:
    """Adapters "a", "b", ... of these ranks, and None."""
    made = {chr(ord("a") + i): adapter(i, r) for i, r in enumerate(ranks)}
    for name, one in made.items():
        pool.load(name, one.tensors, one.config)
    return {None: None, **made}
