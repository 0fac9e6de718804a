"""The training loop and what it leaves on disk: checkpoints, logs, counts of work and memory."""
