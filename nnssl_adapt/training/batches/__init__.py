"""From the case store to augmented batches."""
