"""The tables of docs/train.md, from configs and settings as they are: python -m docs.train_tables.

Writes them into the page, between the lines that mark them.
"""

import ast
import inspect
import textwrap
from pathlib import Path
from typing import Any, get_args, get_type_hints

from dtcp.torchtitan.loss import TokenLoss
from dtcp.torchtitan.section import Section

from docs.marked_tables import with_tables
from dtcp.pretrain import configs
from dtcp.pretrain.checkpoint import Checkpoints
from dtcp.pretrain.data import PackedDocuments
from dtcp.pretrain.options import config_names
from dtcp.pretrain.tokenizer import Tokenizer

PAGE = Path(__file__).parent / "train.md"
SECTIONS: dict[str, type] = {
    "dtcp": Section,
    "dataloader": PackedDocuments.Config,
    "tokenizer": Tokenizer.Config,
    "checkpoint": Checkpoints.Config,
    "loss": TokenLoss.Config,
}


def configs_table() -> str:
    """A row for each config of train.py, by the first line of its docstring."""
    rows = ["| `--config` | what it is |", "|---|---|"]
    for name in config_names(configs):
        about = (inspect.getdoc(getattr(configs, name)) or "").splitlines()[0]
        rows.append(f"| `{name}` | {about} |")
    return "\n".join(rows)


def settings_table(section: str) -> str:
    """A row for each setting that the class of a section adds: default and docstring."""
    rows = ["| setting | default | what it says |", "|---|---|---|"]
    rows += [
        f"| `--{section}.{name}` | `{default}` | {about} |"
        for name, default, about in _settings(SECTIONS[section])
    ]
    return "\n".join(rows)


def _settings(owner: type) -> list[tuple[str, Any, str]]:
    """Name, default and docstring of the fields that a class declares itself, in their order."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    assert isinstance(tree, ast.ClassDef)
    made, types = owner(), get_type_hints(owner)
    rows = []
    for field, doc in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            name = field.target.id
            default = getattr(made, name)
            choices = [f"`{each}`" for each in get_args(types[name]) if isinstance(each, str)]
            among = f" One of {', '.join(choices)}." if choices else ""
            # Nothing would show of an empty text.
            shown = default if default not in ("", []) else repr(default)
            rows.append((name, shown, _text(doc) + among))
    return rows


def _text(node: ast.stmt) -> str:
    """A docstring in one line."""
    assert isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return " ".join(inspect.cleandoc(node.value.value).split())


def page(text: str) -> str:
    """The page with its tables made anew."""
    of_sections = {name: settings_table(name) for name in SECTIONS}
    return with_tables(text, {"configs": configs_table(), **of_sections})


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
