"""What is seen of a run: figures, pictures, logs, trackers."""
