from helpers.lora_models import make_base, make_model, make_rows, model, moved, slow_logprobs

__all__ = ["make_base", "make_model", "make_rows", "model", "moved", "slow_logprobs"]
