"""Warnings raised while a model is placed: captured for a report, not printed between its lines."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HERE = Path(__file__).parents[1]


class _Collect(logging.Handler):
    """Collects the warnings of dtcp's loggers."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def captured_warnings() -> Iterator[list[str]]:
    """Capture dtcp's warnings; neither these nor others' are printed.

    Yields:
        what was said, each sentence once; complete when the block ends.
    """
    said: list[str] = []
    captured: list[str] = []
    log, foreign = logging.getLogger("dtcp"), logging.getLogger("transformers")
    handler, propagates, level = _Collect(said), log.propagate, foreign.level
    log.addHandler(handler)
    log.propagate = False
    foreign.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(record=True) as others:
            warnings.simplefilter("default")
            yield captured
        # The file that raised it says whose it is: torch and transformers warn, too.
        said += [
            str(each.message)
            for each in others
            if each.category is UserWarning and _HERE in Path(each.filename).parents
        ]
        captured += dict.fromkeys(said)
    finally:
        foreign.setLevel(level)
        log.propagate = propagates
        log.removeHandler(handler)
