"""Kernels for sm_90: TMA and tensor-map kernels in Triton, one-launch kernels in Gluon."""
