"""Trained models on their way to other people: names, release packages, installing, and the hub."""
