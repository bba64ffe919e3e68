"""Triton kernels: one file is one kernel family and its launcher. chip and tuning are plain data and need no Triton."""
