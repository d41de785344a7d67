"""Training: the loop, checkpoints, schedules and losses."""
