"""Single-device models in plain PyTorch. None of them knows of ranks."""
