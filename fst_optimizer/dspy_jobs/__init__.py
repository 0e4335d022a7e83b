"""What dspy's own optimizers ask of an LM that can be trained: reinforce jobs (GRPO) and finetune jobs."""
