"""Uninitialised memory made visible: an element that a kernel forgets to write is NaN, not a lucky zero."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor

_ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


@contextmanager
def poison() -> Iterator[None]:
    """Within it, torch.empty and its relatives return floating-point memory filled with NaN.

    The Python functions themselves are replaced: a TorchDispatchMode is off while it handles a custom operator, so it
    doesn't see what that operator's launcher allocates.
    """
    with ExitStack() as stack:
        for owner, name in _ALLOCATORS:
            stack.enter_context(mock.patch.object(owner, name, _filled_with_nan(getattr(owner, name))))
        yield


def _filled_with_nan(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(allocate)
    def poisoned(*args: object, **kwargs: object) -> Tensor:
        memory = allocate(*args, **kwargs)
        if memory.is_floating_point() or memory.is_complex():
            memory.detach().fill_(float("nan"))
        return memory

    return poisoned
