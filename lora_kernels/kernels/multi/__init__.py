"""Kernels of a batch in which each row has its own adapter."""
