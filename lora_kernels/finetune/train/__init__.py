"""The training loop, its checkpoints, random states and memory measurements."""
