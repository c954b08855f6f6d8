"""A training run: its files, and the order in which things happen."""
