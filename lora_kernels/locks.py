"""Locks that a child of os.fork can take.

A fork copies the memory and one thread. A lock that another thread held at that moment would stay locked in the child
forever, since the child does not have that thread. Therefore every lock of the package is made here and is free in a
child.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

_locks: weakref.WeakSet[Any] = weakref.WeakSet()
_callbacks: list[Callable[[], None]] = []


def fork_safe_lock() -> threading.Lock:
    """A threading.Lock that is free in the child of a fork."""
    return _kept(threading.Lock())


def fork_safe_rlock() -> threading.RLock:
    """A threading.RLock that is free in the child of a fork."""
    return _kept(threading.RLock())


def after_fork(function: Callable[[], None]) -> None:
    """Call ``function`` in every child process, after the locks are freed."""
    _callbacks.append(function)


def _kept(lock: Any) -> Any:
    _locks.add(lock)
    return lock


def _release_in_child() -> None:
    for lock in list(_locks):
        if not getattr(lock, "_is_owned", bool)():  # an RLock that the forking thread holds is the child's own
            lock._at_fork_reinit()
    for function in _callbacks:
        function()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_release_in_child)
