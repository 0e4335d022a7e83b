"""One run on disk: its state, its numbers, its scores."""
