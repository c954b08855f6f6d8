"""The web pages on a folder of runs: read what training left behind, compare, and review references."""
