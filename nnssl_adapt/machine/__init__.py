"""What this job may use of its machine: cores, memory, devices, worker processes, scratch folders, locks."""
