"""Ways to run a model other than our own network."""
