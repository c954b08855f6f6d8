"""Web pages on a folder of runs: people read and compare the runs there, and review their references."""
