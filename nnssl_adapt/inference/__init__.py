"""From a trained model folder and images to segmentations."""
