"""What is in the file? Its tensors and its plan, brought together."""
