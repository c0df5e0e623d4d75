"""The FinetunePlan: how this dataset is preprocessed and which network is trained on it, from which weights."""
