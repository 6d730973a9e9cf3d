"""Methods beside each other: a grid of runs with one budget and one search, and its table."""
