"""What people read of a run: pages, curves, tables of groups, reviews, trackers."""
