"""Serving on trial: layers under mixed batches, ours and the rivals' ways to run them, judged and timed."""
