"""One base model and its LoRA adapters."""
