"""Bytes on disk, what was spent, and the numbers of a run."""
