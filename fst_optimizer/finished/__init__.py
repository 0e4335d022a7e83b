"""A finished run, used again."""
