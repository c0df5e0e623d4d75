"""A run's folder, identity, checkpoints, and its stopping in good order."""
