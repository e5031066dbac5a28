"""Single-device models in plain PyTorch. None of them knows of ranks."""

if __name__ != "dtcp.models":
    raise ImportError(
        f"The models are imported as dtcp.models, got {__name__}: write dtcp.models in the import, "
        f"for two names make two copies of every class."
    )
