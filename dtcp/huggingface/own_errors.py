"""Other people's code: how it is imported, and what it raises, put in a sentence."""

import importlib
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn


class ModelRefused(ValueError):
    """A sentence that says what a model cannot do, and where."""


@contextmanager
def own_errors(did: str, remedy: str) -> Iterator[None]:
    """Put what other people's code raises in a sentence.

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


def imported(path: str) -> Callable[..., Any]:
    """Import the function that a path module:function names.

    Raises:
        ValueError: a path without a function, or a module without that function.
    """
    module, _, name = path.partition(":")
    if not name:
        raise ValueError(f"A function is named module:function, got {path!r}: add its name.")
    try:
        with own_errors(f"{module} is imported", "correct it"):
            imported_module = importlib.import_module(module)
    except ValueError as error:
        missing = getattr(error.__cause__, "name", None)
        if isinstance(error.__cause__, ModuleNotFoundError) and f"{module}.".startswith(
            f"{missing}."
        ):
            raise ValueError(
                f"A function is named module:function, got {path!r}: there is no module {missing}; "
                f"correct it, or the path of Python (PYTHONPATH)."
            ) from error.__cause__
        raise
    function: Callable[..., Any] | None = getattr(imported_module, name, None)
    if not callable(function):
        kind = "no" if function is None else f"a {type(function).__name__}"
        raise ValueError(
            f"A function is named module:function, got {path!r}: {module} has {kind} {name}."
        )
    return function


def model_of_function(path: str, /, **change: Any) -> nn.Module:
    """The model that a function module:function returns.

    Args:
        change: its keyword arguments.
    Raises:
        ValueError: there is no such function, or it fails, or returns something else.
    """
    function, keywords = imported(path), ", ".join(f"{key}={x!r}" for key, x in change.items())
    remedy = "give a function that returns the model; dtcp.check's --set gives it key=json"
    with own_errors(f"A model is built by {path}({keywords})", remedy):
        model = function(**change)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"A function of --model returns an nn.Module, got {type(model).__name__} from {path}: "
            f"return the model."
        )
    return model
