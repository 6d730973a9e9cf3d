"""A run: its directory, its loop, its evaluation, its summary, its export."""
