"""A prompt into weights: on-policy distillation of a program from its long prompt into a shorter one."""
