"""Serves many adapters over one model; each request of a batch names its adapter."""

from lora_kernels.pool.pool import AdapterPool

__all__ = ["AdapterPool"]
