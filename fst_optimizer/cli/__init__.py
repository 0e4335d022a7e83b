"""The fst command."""
