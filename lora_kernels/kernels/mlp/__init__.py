"""Kernels of a LoRA MLP: the SwiGLU between its projections."""
