"""The training loop and what it keeps: checkpoints, random states, memory."""
