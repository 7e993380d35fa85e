"""Training: checkpoints, metrics and what the run folder promises."""
