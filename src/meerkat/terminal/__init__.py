"""What a process shows on a terminal: progress and tables."""
