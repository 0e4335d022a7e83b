"""What generates tokens from a policy version, and what records them."""
