"""A training run: what is on disk, and what happens in which order."""
