"""Training: the loop, one step's gradient, optimizer, checkpoints, metrics, first-batch checks and the run folder."""
