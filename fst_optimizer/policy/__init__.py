"""The policy: versions of a model, published to an engine, behind a dspy LM."""
