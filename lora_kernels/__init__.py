"""LoRA layers that cost what their frozen linear layer costs.

Names are imported on first use: ``import lora_kernels`` loads no Triton and no model library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_kernels.adapters import load_adapter, merge_lora, save_adapter, unmerge_lora
    from lora_kernels.autograd.dora_linear import dora_linear
    from lora_kernels.autograd.lora_linear import lora_linear
    from lora_kernels.autograd.lora_linear_stacked import Projection, lora_linear_stacked
    from lora_kernels.autograd.lora_mlp import lora_mlp
    from lora_kernels.autograd.multi_lora_linear import multi_lora_linear
    from lora_kernels.config import LoRAConfig
    from lora_kernels.errors import (
        AdapterBusyError,
        AdapterFormatError,
        AdapterPoolError,
        BackendUnavailableError,
        ConfigError,
        FrozenWeightError,
        LoRAKernelsError,
        MergeError,
        PoolFullError,
        ShapeError,
        UnknownAdapterError,
        UnknownRowsError,
        UnservableAdapterError,
    )
    from lora_kernels.finetune import LoRA, Trainer
    from lora_kernels.finetune.train.loraplus import loraplus_groups
    from lora_kernels.integrations.peft.accelerate import accelerate, decelerate
    from lora_kernels.layers import DoRALinear, LoRAGateUp, LoRALinear, LoRAMLP, LoRAQKV
    from lora_kernels.models.inject import apply_lora, explain
    from lora_kernels.operands.slots import Slots
    from lora_kernels.planning.choose import use_backend
    from lora_kernels.pool import AdapterPool

__version__ = "0.1.0"

_HOME = {
    "dora_linear": "lora_kernels.autograd.dora_linear",
    "loraplus_groups": "lora_kernels.finetune.train.loraplus",
    "lora_linear": "lora_kernels.autograd.lora_linear",
    "lora_linear_stacked": "lora_kernels.autograd.lora_linear_stacked",
    "lora_mlp": "lora_kernels.autograd.lora_mlp",
    "multi_lora_linear": "lora_kernels.autograd.multi_lora_linear",
    "Slots": "lora_kernels.operands.slots",
    "Projection": "lora_kernels.autograd.lora_linear_stacked",
    "DoRALinear": "lora_kernels.layers",
    "LoRALinear": "lora_kernels.layers",
    "LoRAQKV": "lora_kernels.layers",
    "LoRAGateUp": "lora_kernels.layers",
    "LoRAMLP": "lora_kernels.layers",
    "LoRAConfig": "lora_kernels.config",
    "apply_lora": "lora_kernels.models.inject",
    "explain": "lora_kernels.models.inject",
    "accelerate": "lora_kernels.integrations.peft.accelerate",
    "decelerate": "lora_kernels.integrations.peft.accelerate",
    "AdapterPool": "lora_kernels.pool",
    "save_adapter": "lora_kernels.adapters",
    "load_adapter": "lora_kernels.adapters",
    "merge_lora": "lora_kernels.adapters",
    "unmerge_lora": "lora_kernels.adapters",
    "use_backend": "lora_kernels.planning.choose",
    "LoRA": "lora_kernels.finetune",
    "Trainer": "lora_kernels.finetune",
    "LoRAKernelsError": "lora_kernels.errors",
    "BackendUnavailableError": "lora_kernels.errors",
    "ShapeError": "lora_kernels.errors",
    "FrozenWeightError": "lora_kernels.errors",
    "ConfigError": "lora_kernels.errors",
    "AdapterFormatError": "lora_kernels.errors",
    "MergeError": "lora_kernels.errors",
    "AdapterPoolError": "lora_kernels.errors",
    "PoolFullError": "lora_kernels.errors",
    "AdapterBusyError": "lora_kernels.errors",
    "UnknownAdapterError": "lora_kernels.errors",
    "UnknownRowsError": "lora_kernels.errors",
    "UnservableAdapterError": "lora_kernels.errors",
}

__all__ = [
    "AdapterBusyError",
    "AdapterFormatError",
    "AdapterPool",
    "AdapterPoolError",
    "BackendUnavailableError",
    "ConfigError",
    "DoRALinear",
    "FrozenWeightError",
    "LoRA",
    "LoRAConfig",
    "LoRAGateUp",
    "LoRAKernelsError",
    "LoRALinear",
    "LoRAMLP",
    "LoRAQKV",
    "MergeError",
    "PoolFullError",
    "Projection",
    "ShapeError",
    "Slots",
    "Trainer",
    "UnknownAdapterError",
    "UnknownRowsError",
    "UnservableAdapterError",
    "accelerate",
    "apply_lora",
    "decelerate",
    "dora_linear",
    "explain",
    "load_adapter",
    "lora_linear",
    "lora_linear_stacked",
    "lora_mlp",
    "loraplus_groups",
    "merge_lora",
    "multi_lora_linear",
    "save_adapter",
    "unmerge_lora",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lora_kernels' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
