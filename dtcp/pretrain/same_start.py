"""Whether all ranks were started alike: by one config, on the same data.

Ranks of other hosts read other command lines, files and copies of the data. A learning rate or a
seed of its own gives a run that nobody asked for, and its loss looks well; a number of steps or an
interval of its own leaves the others waiting.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import distributed as dist

from dtcp.pretrain.checkpoint_choice import agree
from dtcp.pretrain.config_record import config_changes, settings_of_ranks
from dtcp.pretrain.fingerprint import changes

T = TypeVar("T", bound=Mapping[str, Any])
NAMED = 3
"""Ranks, and differences of each, that an error names."""


def refuse_other_settings(config: Any) -> None:
    """Refuse, on all ranks, that one of them has other settings than rank 0.

    Paths are left out, for hosts may keep things in other places.

    Raises:
        ValueError: naming rank and setting.
    """
    command = "start all ranks by one command, with the same files of configs on every host"
    _refuse("settings", settings_of_ranks(config), config_changes, command)


def refuse_other_data(fingerprint: dict[str, Any]) -> None:
    """Refuse, on all ranks, that one of them has other data than rank 0.

    Every rank packs every row and keeps its own: of other data it would keep rows that others
    have, too, or that nobody misses.

    Raises:
        ValueError: naming rank and what differs.
    """
    _refuse("data", _placeless(fingerprint), changes, "bring the same data to every host")


def _placeless(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """A fingerprint without the folder of its files, and what was noted of their download."""
    files = fingerprint.get("files")
    if not files:
        return fingerprint
    visible = {
        name: mark
        for name, mark in files.items()
        if not any(part.startswith(".") for part in name.split("/"))
    }
    rest = {key: value for key, value in fingerprint.items() if key not in ("files", "dataset")}
    return {**rest, "files": visible}


def _refuse(what: str, own: T, differences: Callable[[T, T], list[str]], remedy: str) -> None:
    found = differences(agree(lambda: own), own)
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, (found[:NAMED], max(0, len(found) - NAMED)))
    said = [
        f"rank {rank}: {'; '.join(named)}" + (f" and {more} more" if more else "")
        for rank, (named, more) in enumerate(of_ranks)
        if named
    ]
    if said:
        more = f" | and {len(said) - NAMED} ranks more" if len(said) > NAMED else ""
        raise ValueError(
            f"All ranks of a run have the same {what}, got others than rank 0's on "
            f"{' | '.join(said[:NAMED])}{more}: {remedy}."
        )
