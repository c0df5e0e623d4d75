"""How does the work run on a GPU, and what does it wait for?"""
