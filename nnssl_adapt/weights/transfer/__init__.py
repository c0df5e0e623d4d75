"""How do the weights fit another network? ``transfer_weights`` accounts for every tensor."""
