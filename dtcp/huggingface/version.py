"""The versions of transformers that are supported."""

from collections.abc import Iterator

LEAST = (5, 15)


def too_old() -> Iterator[str]:
    """Why transformers before 5.15 is refused.

    It names weights in files differently, and before 5.0 makes other masks.
    """
    from transformers import __version__

    if tuple(int(part) for part in __version__.split(".")[:2]) < LEAST:
        yield (
            f"Models of transformers are served from version 5.15 on, got "
            f"transformers={__version__}: pip install 'transformers>=5.15'."
        )
