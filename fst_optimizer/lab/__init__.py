"""Comparisons and measurements, each a command of `fst lab`."""
