"""Tables of a page, between the lines that mark them."""

from collections.abc import Mapping


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """The page with its tables made anew.

    Args:
        tables: Markdown, by the names in `<!-- name -->` and `<!-- end of name -->`.
    """
    for name, table in tables.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, rest = text.split(start)
        text = f"{before}{start}{table}\n{end}{rest.split(end)[1]}"
    return text
