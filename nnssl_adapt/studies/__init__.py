"""Studies: many runs that together answer one question, such as whether these weights help on little data."""
