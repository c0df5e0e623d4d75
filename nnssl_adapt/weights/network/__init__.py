"""What network is it? Described by plain data, built, and read off tensors."""
