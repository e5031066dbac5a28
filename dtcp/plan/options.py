"""Options of the planner that do not exist, or that another option leaves without effect."""

import argparse
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PLANNED = frozenset(
    [
        *("config", "hf_config", "model", "plan", "cluster", "seq_len", "global_batch"),
        *("documents", "mesh", "json", "html"),
    ]
)
_SWEPT = frozenset(
    [
        *("config", "hf_config", "model", "plan", "cluster", "seq_len", "documents"),
        *("sweep", "ranks", "out", "steps"),
    ]
)
READ: Mapping[str, frozenset[str]] = {
    "a plan": _PLANNED,
    "--sweep": _SWEPT,
    "--collect": frozenset(["collect"]),
}
"""What each use of the command reads."""


def check_options(
    arguments: argparse.Namespace, defaults: Mapping[str, Any], rest: Sequence[str]
) -> None:
    """Refuse options that would not be used, before anything is worked out.

    Args:
        defaults: of the arguments, by name.
        rest: what the parser did not know: settings of a config, if there is one.
    Raises:
        ValueError: naming the option.
    """
    options = {name: f"--{name.replace('_', '-')}" for name in vars(arguments)}
    for name in ("collect", "config", "hf_config", "model"):
        # As an unset variable of a shell leaves it.
        if getattr(arguments, name) == "":
            raise ValueError(
                f"What is planned has a name, got {options[name]} '': name a config, a model or a "
                f"folder."
            )
    typos = [word for word in rest if _meant(word, list(options.values()))]
    if typos or (rest and not arguments.config):
        _refuse_unknown(typos or rest, list(options.values()))
    use = "--collect" if arguments.collect else "--sweep" if arguments.sweep else "a plan"
    for name, option in options.items():
        value = getattr(arguments, name)
        if name not in READ[use] and value != defaults[name]:
            raise ValueError(
                f"An option is given where it is read, got {option} {value} for {use}, which does "
                f"not read it: leave it out."
            )
    if arguments.plan and not arguments.model:
        raise ValueError("--plan goes with --model, got it alone: add --model module:function.")
    page = arguments.html and Path(arguments.html)
    if page and (not page.parent.is_dir() or page.is_dir()):
        raise ValueError(
            f"A page is a file in a folder that is there, got --html {page}: make {page.parent} "
            f"first, or name a file."
        )


def _refuse_unknown(rest: Sequence[str], options: Sequence[str]) -> None:
    if meant := _meant(rest[0], options):
        raise ValueError(f"The planner has no option {rest[0]}: did you mean {meant}?")
    raise ValueError(
        f"Settings belong to a config of train.py, got {' '.join(rest)} without --config: leave "
        f"them out."
    )


def _meant(word: str, options: Sequence[str]) -> str:
    """The option that a word looks like a typo of; none for one of train.py's."""
    word = word.partition("=")[0]
    if not word.startswith("--") or "." in word or word in ("--module", "--dump_folder"):
        return ""
    return next(iter(difflib.get_close_matches(word, options, n=1, cutoff=0.75)), "")
