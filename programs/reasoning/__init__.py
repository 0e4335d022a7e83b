"""The data sets of the reasoning-gym package, scored by their own scorers."""
