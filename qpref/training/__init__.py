"""The training loop and all that surrounds it: optimizer, checkpoints, metrics, first-batch checks, the run folder."""
