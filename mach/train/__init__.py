"""Training: the loop, the optimiser, the schedule and the checkpoints."""
