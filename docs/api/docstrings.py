"""Read docstrings as this project writes them.

griffe, which mkdocstrings reads code with, wants an empty line before each section, and takes what
stands before a colon in Returns for a type. Here sections follow each other directly, and Returns
is a sentence, whose type the signature has.
"""

import re
import textwrap
from typing import Any

import griffe

_SECTION = re.compile(r"\n(?=(?:Args|Keyword Args|Attributes|Returns|Raises):\n)")
_RETURNS = re.compile(r"^Returns:\n((?:    .*(?:\n|$))+)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Put an empty line before sections, Returns into a paragraph, and examples into blocks."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = _SECTION.sub("\n\n", obj.docstring.value)
            text = _RETURNS.sub(_paragraph, text)
            # Indented behind an empty line, it is a block of code.
            obj.docstring.value = text.replace("\nExample::\n", "\n**Example:**\n\n")


def _paragraph(returns: re.Match[str]) -> str:
    return f"**Returns:** {textwrap.dedent(returns[1]).strip()}\n\n"
