"""Convert errors of a command, from this package or a library, to one sentence on stderr and an exit status.

Imports no large library, so that errors and Ctrl-C during the import of torch are handled too.
"""

from __future__ import annotations

import errno
import json
import os
import re
import select
import signal
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from lora_kernels.errors import LoRAKernelsError

DONE, FAULT, MISTAKE, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141  # 128 + the signal's number, as shells count
VARIABLE = "LORA_KERNELS_TRACEBACK"
_PACKAGE = Path(__file__).parents[1]
_MEMORY = re.compile(r"can't allocate memory|out of memory|cannot allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.I)
_SPACE = re.compile(r"no space left|disk is full|disk quota|code: 28\b|file too large|code: 27\b", re.I)
_REMEDIES = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some space, or write to another disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or write to another disk",
    errno.EACCES: "choose a place that you may read or write",
    errno.EPERM: "choose a place that you may read or write",
    errno.EROFS: "choose a place that can be written to",
    errno.ENOENT: "check the path",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}


def guarded(name: str, run: Callable[[], int]) -> int:
    """Call ``run()`` and return its exit status; if it raises, print the error on stderr and return its status.

    MISTAKE for an error that the user can correct, FAULT for a fault in this package. LORA_KERNELS_TRACEBACK=1 shows
    tracebacks.
    """
    try:
        _open_streams()
        try:
            return run()
        finally:
            sys.stdout.flush()  # an error here can still be reported
    except KeyboardInterrupt:
        _say("\ninterrupted")
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _unread(sys.stdout, sys.stderr):
            _drop(sys.stdout, sys.stderr)
            return BROKEN_PIPE
        if os.environ.get(VARIABLE, "0") not in ("", "0"):
            _say("".join(traceback.format_exception(error)).rstrip())
        text, status = explained(error)
        _say(f"{name}: {' '.join(text.split())}")
        _drop(sys.stdout)
        return status


@contextmanager
def interruptible() -> Iterator[None]:
    """Make a context for imports that raises KeyboardInterrupt at its end if Ctrl-C was pressed in it.

    Extension modules may clear an exception that is raised while they load, or convert it to an ImportError.
    """
    seen = []

    def handler(number: int, frame: FrameType | None) -> Any:
        seen.append(number)
        raise KeyboardInterrupt

    usual = threading.current_thread() is threading.main_thread()
    usual = usual and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if usual:
        signal.signal(signal.SIGINT, handler)
    try:
        yield
    except Exception:
        if not seen:
            raise
    finally:
        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if seen:
        raise KeyboardInterrupt


def explained(error: Exception) -> tuple[str, int]:
    """Return (sentence for stderr, exit status) for an error."""
    text, kind = str(error).strip(), type(error).__name__
    if isinstance(error, LoRAKernelsError):
        return text, MISTAKE
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or _MEMORY.search(text):
        what = _shortened(text) or "not enough memory"
        return f"{what}: use smaller sizes (batch, length, rank, model), or a machine with more memory", MISTAKE
    if isinstance(error, OSError) and error.errno is not None:
        remedy = _REMEDIES.get(error.errno)
        return f"{text}: {remedy}" if remedy else text, MISTAKE
    if _SPACE.search(text):
        return f"{_shortened(text)}: {_REMEDIES[errno.ENOSPC]}", MISTAKE
    hint = f"{VARIABLE}=1 shows where"
    if isinstance(error, UnicodeError | json.JSONDecodeError):
        return (
            f"a file or a text could not be decoded as JSON or UTF-8 ({kind}: {_shortened(text)}); check the "
            f"files; {hint}"
        ), MISTAKE
    if library := _foreign(error):
        return (
            f"{library} refused ({kind}: {_shortened(text)}): check the files and the values given to this command; "
            f"{hint}"
        ), MISTAKE
    return f"{kind}: {_shortened(text)}; this is a fault of lora_kernels, please report it: {hint}", FAULT


def _foreign(error: BaseException) -> str | None:
    """Find the library that raised the error, by the error's class or the innermost frame; None for this package."""
    library = type(error).__module__.partition(".")[0]
    if library not in ("builtins", "lora_kernels", *sys.stdlib_module_names) or library == "sqlite3":
        return library.removesuffix("_rust")
    places = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).is_relative_to(_PACKAGE):
            return None
        for place in places:
            if place and Path(frame.filename).is_relative_to(place):
                return Path(frame.filename).relative_to(place).parts[0].removesuffix(".py")
    return None


def _shortened(text: str, most: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]}..."


def _say(text: str) -> None:
    with suppress(OSError, ValueError):  # stderr is closed: the message cannot be printed
        print(text.encode("utf-8", "backslashreplace").decode(), file=sys.stderr, flush=True)


def _unread(*streams: Any) -> bool:
    """Check whether one of the streams is a pipe that its reader has closed."""
    for stream in streams:
        with suppress(OSError, ValueError, AttributeError):  # not a file, or a system without poll
            poll = select.poll()
            poll.register(stream.fileno(), 0)
            if any(event & select.POLLERR for _, event in poll.poll(0)):
                return True
    return False


def _drop(*streams: Any) -> None:
    """Redirect broken streams to os.devnull. Otherwise Python's last flush would print an error."""
    for stream in streams:
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError, AttributeError):
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, stream.fileno())
                os.close(nothing)


def _open_streams() -> None:
    """Make stdout and stderr accept any text, also if they are closed or have an encoding such as ASCII."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (for the rest of the process)
        with suppress(AttributeError, OSError, ValueError):
            getattr(sys, name).reconfigure(errors="backslashreplace")
