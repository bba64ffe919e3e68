"""Types for argparse. Each parses one value; its error names the given value and the accepted ones."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from lora_kernels.config import MAX_ALPHA, MAX_RANK
from lora_kernels.errors import ConfigError
from lora_kernels.planning.choose import split_name

Value = TypeVar("Value")
MAX_COUNT = 2**31 - 1
MAX_SEED = 2**63 - 1  # the largest integer in a checkpoint; torch.manual_seed accepts it
MAX_SPLIT_SEED = 2**32 - 1  # the limit of NumPy's generators, which scikit-learn's splits use
MAX_FLOAT = 3e38  # just below float32's largest number: rates and ratios are multiplied into float32 tensors
MAX_SECONDS = 1e9


def refused(text: str, accepted: str) -> argparse.ArgumentTypeError:
    """Make the error that argparse prints after "argument --option:"."""
    shown = repr(text if len(text) <= 60 else f"{text[:57]}...")
    return argparse.ArgumentTypeError(f"{shown} was given; accepted is {accepted}")


def whole(least: int = 0, most: int = MAX_COUNT, but: str = "") -> Callable[[str], int]:
    """Make a type for integers from ``least`` to ``most``. ``but`` is appended to the error message."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise refused(text, f"a whole number of at least {least} and at most {most}{but}")
        return value

    return read


def real(
    least: float = -MAX_FLOAT, most: float = MAX_FLOAT, *, above: float | None = None, below: float | None = None
) -> Callable[[str], float]:
    """Make a type for finite numbers x with least <= x (or above < x) and x <= most (or x < below)."""
    low = f"from {least:g}" if above is None else f"above {above:g}"
    accepted = f"a number {low} to {most:g}" if below is None else f"a number {low} and below {below:g}"

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        inside = (value >= least if above is None else value > above) and (
            value <= most if below is None else value < below
        )
        if not inside:  # NaN is refused too
            raise refused(text, accepted)
        return value

    return read


def several(kind: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """Make a type for a list of one or more values separated by commas."""

    def read(text: str) -> list[Value]:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not parts:
            raise refused(text, "one value or more, separated by commas")
        return [kind(part) for part in parts]

    return read


def names(text: str) -> list[str]:
    """Parse different names separated by commas."""
    found = several(str)(text)
    if len(set(found)) < len(found) or len(found) != len(text.split(",")):
        raise refused(text, "names separated by commas, each once and none of them empty")
    return found


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """Make a type for one of ``names``, for options that cannot use argparse's ``choices``."""

    def read(text: str) -> str:
        if text not in names:
            raise refused(text, f"one of {', '.join(names)}")
        return text

    return read


rank = whole(1, MAX_RANK)
count = whole(1)
seed = whole(0, MAX_SEED)
split_seed = whole(0, MAX_SPLIT_SEED)
probability = real(0.0, 1.0)
held_out = real(above=0.0, below=0.5)
rate = real(above=0.0)
seconds = real(above=0.0, most=MAX_SECONDS)


def number(text: str) -> int | float:
    """Parse a finite number: int 32 from "32" or "32.0", float 0.5 from "0.5".

    Whole numbers become ints, as in the adapter's configuration.
    """
    value = real(-MAX_ALPHA, MAX_ALPHA)(text)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def threads(text: str) -> int:
    """Parse a number of CPU threads: at most the number of cores (or of OMP_NUM_THREADS); 0: torch's default.

    OpenMP starts as many threads as are requested, and the process crashes at about ten thousand.
    """
    most = max(os.cpu_count() or 1, torch.get_num_threads())
    return whole(0, most, ", the number of cores here; with 0 torch chooses")(text)


def unusable(name: str) -> str | None:
    """Return the reason why a device cannot compute, or None. "meta" is refused: it has no data."""
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # RuntimeError, AssertionError, ImportError, ..., depending on the device
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
    return None


def device(text: str) -> str:
    """Parse a device that can be used on this machine, or "auto"."""
    if text != "auto" and (reason := unusable(text)):
        raise refused(text, f"auto, cpu, or a GPU that torch finds here such as cuda or cuda:0 ({reason})")
    return text


def checked(check: Callable[[str], object]) -> Callable[[str], str]:
    """Make a type for texts that ``check`` accepts. argparse would hide its ConfigError, so it is converted."""

    def read(text: str) -> str:
        if len(text) > 1000:
            raise refused(text, "a name of at most 1,000 characters")
        try:
            check(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return read


backend = checked(split_name)  # checks only the name; whether the backend can run depends on the tensors


def model(text: str) -> str:
    """Parse a model's name. Whether the model exists is checked when it is loaded."""
    if not text.strip() or len(text) > 4096:
        raise refused(text, "the name of a packaged model, a folder or a hub id")
    return text


def input_file(*names: str) -> Callable[[str], str]:
    """Make a type for an existing, readable file, or one of ``names``."""
    accepted = ", ".join([*names, "or a file that exists"]) if names else "a file that exists"

    def read(text: str) -> str:
        if text in names:
            return text
        path = _path(text, accepted)
        if not _found(path, text, accepted) or path.is_dir():
            raise refused(text, f"{accepted} ({'this is a folder' if path.is_dir() else 'no such file'})")
        if not os.access(path, os.R_OK):
            raise refused(text, f"{accepted} and can be read (this one cannot)")
        return text

    return read


def input_path(text: str) -> Path:
    """Parse the path of an existing, readable file."""
    return Path(input_file()(text))


def input_folder(text: str) -> Path:
    """Parse the path of an existing folder."""
    path = _path(text, "a folder that exists")
    if not _found(path, text, "a folder that exists") or not path.is_dir():
        raise refused(text, "a folder that exists")
    return path


def output_folder(text: str) -> Path:
    """Parse the path of a folder that can be written to, or created."""
    path = _path(text, "a folder that can be written to")
    if _found(path, text, "a folder that can be written to") and not path.is_dir():
        raise refused(text, "a folder that can be written to (this is a file)")
    return _writable(path, text)


def replaced_file(text: str) -> Path:
    """Parse the path of a regular file to replace by renaming, or of a new file."""
    path = output_file(text)
    if path.exists() and not path.is_file():
        raise refused(text, "a regular file, or a new one")
    return path


def output_file(text: str) -> Path:
    """Parse the path of a file that can be written, in a folder that exists or can be created."""
    path = _path(text, "a file that can be written")
    if not _found(path, text, "a file that can be written"):
        return _writable(path, text)
    if path.is_dir() or not os.access(path, os.W_OK):
        raise refused(
            text, f"a file that can be written (this is {'a folder' if path.is_dir() else 'write-protected'})"
        )
    return path


def _path(text: str, accepted: str) -> Path:
    if not text.strip():
        raise refused(text, accepted)
    return Path(text)


def _found(path: Path, text: str, accepted: str) -> bool:
    """Check whether the path exists. A name that the system rejects or cannot look up is refused."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # too long a name, no permission, a loop of links
        raise refused(text, f"{accepted} ({getattr(error, 'strerror', None) or error})") from None
    return True


def _writable(path: Path, text: str) -> Path:
    """Return ``path`` if it, or its nearest existing parent folder, can be written to."""
    above = path.absolute()
    while not _found(above, text, "a place that can be written to"):
        above = above.parent
    if not above.is_dir():
        raise refused(text, f"a place that can be written to ({above} is not a folder)")
    if not os.access(above, os.W_OK | os.X_OK):
        raise refused(text, f"a place that can be written to ({above} is write-protected)")
    return path
