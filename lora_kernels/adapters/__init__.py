"""Adapters as files and as part of the weights."""

from lora_kernels.adapters.checkpoint import load_adapter, save_adapter
from lora_kernels.adapters.merge import merge_lora, unmerge_lora

__all__ = ["load_adapter", "merge_lora", "save_adapter", "unmerge_lora"]
