"""A vLLM server as the engine."""
