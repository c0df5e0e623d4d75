"""Loss, optimiser, schedule, precision: how a network learns."""
