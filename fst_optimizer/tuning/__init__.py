"""Tuning FST's settings with Optuna: `fst tune` and `fst_optimizer.tune`. All of it needs the extra `tune`."""

from fst_optimizer.errors import need_extra

need_extra("tune", "optuna", "plotly", "sklearn", "matplotlib", "scipy")
