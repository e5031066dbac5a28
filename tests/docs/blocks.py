"""The code blocks of the pages, as a reader meets them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))

_FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Args:
        ranks: processes that run it, 0 for one that knows nothing of ranks.
        title: the file it is a part of; "" for a block that is run as it stands.
    """

    page: str
    language: str
    ranks: int
    title: str
    text: str


def blocks_of(path: Path) -> list[Block]:
    """All blocks of a page, in order."""
    found = []
    for language, rest, text in _FENCE.findall(path.read_text()):
        title = re.fullmatch(r'(?: title="([^"]+)")?', rest)
        assert title, f"{path}: a block that opens with {language}{rest}"
        name = title[1] or ""
        ranks = re.fullmatch(r"on (\d) ranks", name)
        page, number = str(path.relative_to(ROOT)), int(ranks[1]) if ranks else 0
        found.append(Block(page, language, number, "" if ranks else name, text))
    return found


BLOCKS = [block for path in PAGES for block in blocks_of(path)]
PYTHON = [block for block in BLOCKS if block.language == "python"]


def pages_with(blocks: list[Block]) -> dict[str, list[Block]]:
    """Blocks by page. What two pages print alike is run on the last of them alone."""
    last = {block.text: block for block in blocks}
    by_page: dict[str, list[Block]] = {}
    for block in last.values():
        by_page.setdefault(block.page, []).append(block)
    return by_page


def files_of(page: str) -> dict[str, str]:
    """The files that a page's titled blocks make up, part after part."""
    files: dict[str, str] = {}
    for block in PYTHON:
        if block.page == page and block.title:
            files[block.title] = files.get(block.title, "") + block.text + "\n\n"
    return files


def commands_of(blocks: list[Block]) -> list[tuple[str, str]]:
    """(page, command) of every line in blocks without a language that a shell would run."""
    command = re.compile(
        r"^(?:\$ )?(?:[A-Z]+=\S+ )*((?:make|python|torchrun|pip) .*?)(?:  #.*)?$", re.MULTILINE
    )
    lines = [
        (block.page, found.strip())
        for block in blocks
        if not block.language
        for found in command.findall(block.text.replace("\\\n", ""))
    ]
    return list(dict.fromkeys(lines))
