"""Stores the open batch of each context, thread and generator, and returns it where the model is called."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar
from types import FrameType
from typing import TYPE_CHECKING, Any

from lora_kernels.errors import AdapterPoolError
from lora_kernels.pool.call import Call

if TYPE_CHECKING:
    from lora_kernels.pool.batch import OpenBatch


class _Thread(threading.local):
    batch: OpenBatch | None = None


class ActiveBatch:
    """The batch that is open in this context (a thread, an asyncio task). ``thread``: the batch that is open in this
    thread, for torch.compile, which cannot trace context variables.

    learn: probes the model with the running call of a batch; returns False if that gives nothing new. make_call: makes
    a Call from the arguments of the model. batch_dim: the dimension of the model's inputs that counts the requests,
    once it is known. failure: why the last probe failed. generators: {frame: batch} of batches that generators opened.
    """

    def __init__(self) -> None:
        self.var: ContextVar[Any] = ContextVar("lora_kernels_open_batch", default=None)
        self.get = self.var.get
        self.thread = _Thread()
        self.learn: Callable[[OpenBatch], bool] = lambda _: False
        self.make_call: Callable[..., Call] = lambda args, kwargs: Call(args, kwargs, (), False)
        self.failure = ""
        self.batch_dim: int | None = None
        self.generators: dict[FrameType, OpenBatch] = {}

    def check_generator(self, batch: Any) -> None:
        """Raise AdapterPoolError for two wrong uses of a batch that a generator opened: a call of the model outside of
        the generator while the batch is open; and a call inside of the generator after it was resumed in another thread
        or task, where the batch is not open."""
        at, owner = sys._getframe(1), None
        while at is not None and owner is None:
            owner, at = self.generators.get(at), at.f_back  # type: ignore[assignment]
        inside = batch
        while inside is not None and inside is not owner:
            inside = inside.outer
        if (owner is not None and inside is None) or (batch is not None and batch.frame and owner is not batch):
            raise AdapterPoolError(
                "a batch that a generator has opened is used outside of the generator, or the generator was resumed "
                "in another thread or task; open the batch where the model is called, and not across a yield"
            )

    def __deepcopy__(self, memo: object) -> ActiveBatch:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return ActiveBatch, ()


class Refusing:
    """Takes the place of ``OpenBatch.touched`` in a refused batch: each use raises AdapterPoolError."""

    def __init__(self, message: str) -> None:
        self.message = message

    def __contains__(self, _: object) -> bool:
        raise AdapterPoolError(self.message)


def running(frame: FrameType) -> bool:
    """Whether ``frame`` is on the stack of the caller."""
    at: FrameType | None = sys._getframe(1)
    while at is not None and at is not frame:
        at = at.f_back
    return at is not None
