"""The training loop and its files: checkpoints, logs, counts of work and memory."""
