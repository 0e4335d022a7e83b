"""A tool-using agent: look things up in a table of invented goods, then calculate."""
