"""What a run shows while it goes, and at its end: in a terminal, in a notebook, as plain lines elsewhere."""
