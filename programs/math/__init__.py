"""Mathematical problems with one final answer, checked by math-verify."""
