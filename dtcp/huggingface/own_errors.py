"""What a model that somebody else wrote raises by itself, said in a sentence."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ModelRefused(ValueError):
    """What a model cannot do, in a sentence that names the place."""


@contextmanager
def own_errors(did: str, remedy: str) -> Iterator[None]:
    """Say in a sentence what a model of somebody else raises by itself.

    Raises:
        ValueError: whatever is raised inside.
    """
    try:
        yield
    except ModelRefused:
        raise
    # What runs inside is code of the user's or of transformers, which may raise any class. Whether
    # it runs is the question, so its error is the answer: raised again, with place and remedy.
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(str(error).split())
        # The rest of a long message adds little to where it was raised.
        reason = reason if len(reason) <= 300 else f"{reason[:297]}..."
        raise ValueError(
            f"{did}, got {type(error).__name__} at {Path(frame.filename).name}:{frame.lineno} "
            f"({reason.rstrip('.')}): {remedy}."
        ) from error
