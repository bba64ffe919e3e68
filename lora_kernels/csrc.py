"""The compiled extension of csrc/: whether it is there, and if not, why."""

from __future__ import annotations

import importlib.util


def available() -> str | None:
    """None where the CUDA C++ operators can run; otherwise the reason."""
    if importlib.util.find_spec("lora_kernels._C") is None:
        return "the package was installed without its compiled extension"
    return None
