"""Letter-list tasks: small programs whose rules are hidden, and a small model that can learn them."""
