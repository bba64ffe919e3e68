"""Measures every plan of an operator on the GPU that is there, and writes the winners into a table."""
