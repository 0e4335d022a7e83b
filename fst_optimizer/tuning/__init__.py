"""Tuning FST's settings with Optuna: `fst tune` and `fst_optimizer.tune`."""
