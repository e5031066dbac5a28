"""Read docstrings as this project writes them: one section directly under another.

griffe, which mkdocstrings reads code with, wants an empty line before each section.
"""

import re
from typing import Any

import griffe

_SECTION = re.compile(r"\n(?=(?:Args|Keyword Args|Attributes|Returns|Raises):\n)")


class CloseSections(griffe.Extension):
    """Put an empty line before every section."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _SECTION.sub("\n\n", obj.docstring.value)
