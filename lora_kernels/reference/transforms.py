"""Tests for active transforms of torch.func and forward-mode differentiation, and ways around them and autocast."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch  # type: ignore[attr-defined]
from torch.autograd import forward_ad
from torch.compiler import is_compiling

T = TypeVar("T")

_transforms_active = torch._C._are_functorch_transforms_active


def derived() -> bool:
    """Whether a transform of torch.func or a level of forward-mode differentiation is active."""
    return _transforms_active() or forward_ad._current_level >= 0


def batched(X: Tensor) -> bool:
    """Whether torch.func.vmap maps over X, at any level of nested transforms."""
    while not is_compiling() and _functorch.is_functorch_wrapped_tensor(X):
        if _functorch.is_batchedtensor(X):
            return True
        X = _functorch.get_unwrapped(X)
    return False


def bare(X: Tensor) -> Tensor:
    """X without the wrappers of torch.func, to read its numbers on the host. X must not be mapped over."""
    while not is_compiling() and _functorch.is_functorch_wrapped_tensor(X):
        X = _functorch.get_unwrapped(X)
    return X


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context with autocast off; the caller has cast the operands."""
    on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else nullcontext()


def in_thread(function: Callable[..., T], *args: Any) -> T:
    """function(*args) in a new thread, where no transform is active: for random numbers from a given seed.

    vmap would refuse to draw them, or draw other numbers. For the CPU only: a thread has its own current CUDA stream.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()
