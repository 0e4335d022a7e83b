from helpers.lora_models import make_base, make_model, model, moved

__all__ = ["make_base", "make_model", "model", "moved"]
