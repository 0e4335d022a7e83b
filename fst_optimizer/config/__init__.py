"""Settings: what can be set, and how files and the command line set it."""
