"""The slow step: policy gradient on one LoRA adapter. Importing this imports no torch; the modules below do."""
