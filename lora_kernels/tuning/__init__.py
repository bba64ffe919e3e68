"""Measures every plan of an operator on the current GPU and writes the fastest ones into a table."""
