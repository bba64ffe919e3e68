"""Finds the backend that ``use_backend`` blocks request: the innermost block of the calling thread or task.

A block belongs to the context (contextvars) that entered it. Until it ends it applies there and in tasks that are
created inside of it, and in no other thread or task. Two callers cannot read a context and use the block that was
entered last in the whole program: a graph of torch.compile, which guards on a global variable, and a recomputation in
a thread of autograd's engine.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.compiler import is_compiling

from lora_kernels.errors import ConfigError
from lora_kernels.locks import after_fork, fork_safe_lock


class _Block:
    __slots__ = ("cut", "name", "open", "outer")

    def __init__(self, name: str, outer: _Block | None) -> None:
        self.name, self.outer, self.open, self.cut = name, outer, True, False


latest: str | None = None  # the name of the open block that was entered last; None if no block is open in the program
_open: list[_Block] = []
_lock = fork_safe_lock()
_current: ContextVar[_Block | None] = ContextVar("lora_kernels_backend", default=None)


def requested() -> str:
    """The backend of the enclosing block; "auto" outside of any block."""
    if latest is None:
        return "auto"
    if is_compiling():
        return latest
    block = _innermost()
    if block is not None:
        return block.name
    return latest if _in_engine_thread() else "auto"


@contextmanager
def block(name: str) -> Iterator[None]:
    """Run a block with this backend. Raises ConfigError at its end if blocks of one context overlap without being
    nested; then all of them are ended."""
    global latest
    if is_compiling():
        before, latest = latest, name
        try:
            yield
        finally:
            latest = before
        return
    me = _Block(name, _innermost())
    _current.set(me)
    _change(entered=me)
    try:
        yield
    finally:
        _leave(me)


def _innermost() -> _Block | None:
    """The innermost block of this context that is still open."""
    found = _current.get()
    while found is not None and not found.open:
        found = found.outer
    return found


def _leave(me: _Block) -> None:
    inner = list[_Block]()
    found = _innermost()
    while found is not None and found is not me:
        inner.append(found)
        found = found.outer
    if found is me:  # otherwise the block was entered in another context
        _current.set(me.outer)
    else:
        inner.clear()
    for one in (*inner, me):
        one.open = False
    for one in inner:
        one.cut = True
    _change(left=(*inner, me))
    if inner or me.cut:
        raise ConfigError(
            f"two blocks of use_backend, {me.name!r} among them, overlap in one thread or task (two generators?); "
            "blocks must be nested. Both were ended. Pass backend= in each call, or use separate tasks or threads"
        )


def _change(entered: _Block | None = None, left: tuple[_Block, ...] = ()) -> None:
    global latest
    with _lock:
        if entered is not None:
            _open.append(entered)
        _open[:] = [one for one in _open if one not in left]
        latest = _open[-1].name if _open else None


def _in_engine_thread() -> bool:
    """Whether this code runs in a backward, in a thread that Python did not start."""
    if torch._C._current_graph_task_id() == -1:
        return False
    return isinstance(threading.current_thread(), threading._DummyThread)


def _forget_other_threads() -> None:
    """In the child of a fork, end the blocks of all threads but the one that forked."""
    mine = set[_Block]()
    found = _innermost()
    while found is not None:
        mine.add(found)
        found = found.outer
    _change(left=tuple(one for one in _open if one not in mine))


after_fork(_forget_other_threads)
