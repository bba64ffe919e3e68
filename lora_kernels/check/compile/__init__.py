"""Compiles every kernel for every architecture and reports registers, spills, shared memory and instructions."""
