"""Which backend the blocks of ``use_backend`` ask for: the innermost open one of the thread or task that calls.

A block belongs to the context (contextvars) that entered it: other threads and tasks do not see it, a task that was
made inside of it does until it ends. Two things cannot read a context, and take the block of the program that was
entered last: a graph of torch.compile, which guards on a global, and a recomputation in a thread of autograd's engine.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.compiler import is_compiling

from lora_kernels.errors import ConfigError
from lora_kernels.fork import after_fork, fork_safe_lock


class _Block:
    __slots__ = ("cut", "name", "open", "outer")

    def __init__(self, name: str, outer: _Block | None) -> None:
        self.name, self.outer, self.open, self.cut = name, outer, True, False


latest: str | None = None  # the name of the open block entered last; None where none is open in the program
_open: list[_Block] = []
_lock = fork_safe_lock()
_current: ContextVar[_Block | None] = ContextVar("lora_kernels_backend", default=None)


def requested() -> str:
    """The name that the enclosing block gives, "auto" outside of any."""
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
    """A block with this backend. Raises ConfigError at the end if blocks of one context overlap without being nested:
    all of them are ended then."""
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
    if found is me:  # else it is left in another context than it was entered in
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
            f"two blocks of use_backend overlap in one thread or task (two generators?), {me.name!r} among them: they "
            "must be nested. Both were ended; name the backend in each call, or run them in tasks or threads"
        )


def _change(entered: _Block | None = None, left: tuple[_Block, ...] = ()) -> None:
    global latest
    with _lock:
        if entered is not None:
            _open.append(entered)
        _open[:] = [one for one in _open if one not in left]
        latest = _open[-1].name if _open else None


def _in_engine_thread() -> bool:
    """Whether a backward runs this in a thread that Python did not start."""
    if torch._C._current_graph_task_id() == -1:
        return False
    return isinstance(threading.current_thread(), threading._DummyThread)


def _forget_other_threads() -> None:
    """In the child of a fork: only the blocks of the thread that forked go on."""
    mine = set[_Block]()
    found = _innermost()
    while found is not None:
        mine.add(found)
        found = found.outer
    _change(left=tuple(one for one in _open if one not in mine))


after_fork(_forget_other_threads)
