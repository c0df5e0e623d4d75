"""Is this dataset fit for training? Findings and measurements of every case."""
