"""Training: how the built-in model is made."""
