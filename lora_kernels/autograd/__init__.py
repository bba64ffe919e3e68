"""Differentiable functions: what is saved and what is frozen; no arithmetic."""

from lora_kernels.autograd.lora_linear import lora_linear

__all__ = ["lora_linear"]
