"""What is done to a dspy program: its texts, its LMs, the checks."""
