"""Saves, loads and merges adapters."""

from lora_kernels.adapters.checkpoint import load_adapter, save_adapter
from lora_kernels.adapters.merge import merge_lora, unmerge_lora
from lora_kernels.layers.replication import replicate_layers

__all__ = ["load_adapter", "merge_lora", "replicate_layers", "save_adapter", "unmerge_lora"]
