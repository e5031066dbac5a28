"""The versions of transformers whose models are served."""

from collections.abc import Iterator


def too_old() -> Iterator[str]:
    """What refuses a transformers before 5.0, which makes masks and loads weights otherwise."""
    from transformers import __version__

    if int(__version__.split(".")[0]) < 5:
        yield (
            f"Models of transformers are served from version 5.0 on, got "
            f"transformers={__version__}: pip install 'transformers>=5.0'."
        )
