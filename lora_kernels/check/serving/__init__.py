"""Judges and times layers under mixed batches: ours and the rivals."""
