"""Kernels of one LoRA linear layer."""
