"""Shows a run to people: pages, curves, tables of groups, reviews, trackers."""
