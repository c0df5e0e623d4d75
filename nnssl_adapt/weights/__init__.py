"""Where pre-trained weights come from, what they are, and how they fit a new network."""
