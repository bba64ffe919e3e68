"""Kernels of several LoRA projections of one input (q, k, v; gate, up)."""
