"""Runs as a graph: submitted to Slurm or done on this machine, gone on with, watched and cancelled."""
