"""Programs times examples: rollouts, groups and their credit."""
