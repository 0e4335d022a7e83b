"""Predicting what small generated Python programs return, in two steps: trace the run, then give the output."""
