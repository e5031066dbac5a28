"""Options of the planner that another one leaves without effect, or that are none."""

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
    if rest and not arguments.config:
        _refuse_unknown(rest, list(options.values()))
    use = "--collect" if arguments.collect else "--sweep" if arguments.sweep else "a plan"
    for name, option in options.items():
        value = getattr(arguments, name)
        if name not in READ[use] and value != defaults[name]:
            raise ValueError(
                f"An option is given where it is read, got {option} {value} for {use}, which does "
                f"not: leave it out."
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
    word = rest[0].partition("=")[0]
    close = difflib.get_close_matches(word, options, n=1) if "." not in word else []
    remedy = f"did you mean {close[0]}?" if close else "leave them out."
    raise ValueError(
        f"Settings belong to a config of train.py, got {' '.join(rest)} without --config: {remedy}"
    )
