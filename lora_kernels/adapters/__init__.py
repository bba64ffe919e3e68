"""Adapters as files, as part of the weights, and side by side in a pool."""

from lora_kernels.adapters.checkpoint import load_adapter, save_adapter
from lora_kernels.adapters.merge import merge_lora, unmerge_lora
from lora_kernels.adapters.pool import AdapterPool

__all__ = ["AdapterPool", "load_adapter", "merge_lora", "save_adapter", "unmerge_lora"]
