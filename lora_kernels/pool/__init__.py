"""Many adapters over one model, with a batch whose requests each name their own."""

from lora_kernels.pool.pool import AdapterPool

__all__ = ["AdapterPool"]
