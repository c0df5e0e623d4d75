"""Fine-tuning: the recipe, the loop, and what survives it."""
