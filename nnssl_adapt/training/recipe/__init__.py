"""Everything that a fine-tuning run can vary."""
