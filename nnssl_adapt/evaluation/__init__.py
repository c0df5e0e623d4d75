"""What segmentations are worth: metrics and summaries in the form nnU-Net writes."""
