"""From image files in nnU-Net format to a preprocessed case store."""
