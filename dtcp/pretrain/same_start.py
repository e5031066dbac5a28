"""Checks that all ranks were started alike: one config, one code, the same data and folder.

Ranks of other hosts read other command lines, files and copies of the data. A rank with another
learning rate or seed gives a run that nobody asked for, whose loss looks fine; one with another
number of steps or interval leaves the others waiting.
"""

import contextlib
import hashlib
import socket
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from torch import distributed as dist

from dtcp.pretrain.checkpoint_choice import agree
from dtcp.pretrain.config_record import config_changes, settings_of_ranks
from dtcp.pretrain.fingerprint import changes, fingerprints_of
from dtcp.pretrain.folder_lock import NAME as LOCK
from dtcp.pretrain.folder_lock import holder_of

T = TypeVar("T", bound=Mapping[str, Any])
NAMED = 3
"""Ranks, and differences of each, that an error names."""
LOOKS, PAUSE = 130, 0.5
"""At a folder, and seconds between two: a network file system's client may take it for up to a
minute that a file is not there (acdirmax) which another host has just written."""
COMPUTES = ("torch", "torchtitan", "transformers")
"""Packages whose code ranks run together, where they are imported."""
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.distcp", ".metadata", "manifest.json")
"""Files that weights are read from."""


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

    Every rank packs every row and keeps its own: from other data, some rows would be trained on
    twice and others never.

    Raises:
        ValueError: naming rank and what differs.
    """
    _refuse("data", _placeless(fingerprint), changes, "bring the same data to every host")


def refuse_other_nodes(parallelism: Any, ranks_per_node: int) -> None:
    """Refuse, on all ranks, machines with unequal numbers of ranks where exchanges have two tiers.

    Process groups depend on the number: ranks would hang while they make them.

    Args:
        parallelism: torchtitan's section.
        ranks_per_node: of this rank's machine; 0 where nobody has said.
    Raises:
        ValueError: naming rank and number.
    """
    if parallelism.context_parallel_degree > 1 or parallelism.expert_parallel_degree > 1:
        remedy = (
            "start as many on each, or give all ranks' number (--dtcp.ranks_per_node) for one tier"
        )
        own = {"ranks of a machine": f"{ranks_per_node}"}
        _refuse("number of ranks on their machines", own, config_changes, remedy)


def refuse_other_code() -> None:
    """Refuse, on all ranks, that one of them runs other code than rank 0, as of a stale checkout.

    Raises:
        ValueError: naming rank and package.
    """
    _refuse("code", _code(), config_changes, "install the same versions on every host")


def _code() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in COMPUTES:
        with contextlib.suppress(PackageNotFoundError):
            found |= {name: version(name)} if name in sys.modules else {}
    content, root = hashlib.sha256(), Path(__file__).parents[1]
    for file in files_of_code(root):
        content.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    # Of its files: a checkout has one version for many states.
    return found | {"dtcp": f"of sha256 {content.hexdigest()[:12]}"}


def files_of_code(root: Path) -> list[Path]:
    """The files of a package, with those behind links, as a checkout has them to its neighbours."""
    links = [x for x in root.iterdir() if x.is_symlink() and x.is_dir()]
    return sorted(file for folder in (root, *links) for file in folder.rglob("*.py"))


def refuse_other_weights(folder: Path) -> None:
    """Refuse, on all ranks, that one of them would start from other weights than rank 0.

    Raises:
        ValueError: naming rank and file.
    """
    # Reading a pipe would wait for a writer; that it is no file is said where weights are read.
    found = {file for pattern in WEIGHTS for file in folder.glob(pattern)}
    files = sorted(file for file in found if file.is_file())
    marks = {"files": fingerprints_of(files, folder)}
    _refuse("weights to start from", marks, changes, f"bring the same {folder} to every host")


def refuse_other_folder(folder: Path) -> None:
    """Refuse, on all ranks, that one of them would save into another folder than rank 0's.

    Rank 0 locks the folder with a file that the others must see. At the first save it would be too
    late; and a rank that finds checkpoints in another folder would continue from those.

    Raises:
        ValueError: naming rank and host.
    """
    token = agree(lambda: holder_of(folder))
    looks = 0
    while token and holder_of(folder) != token and looks < LOOKS:
        looks += 1
        time.sleep(PAUSE)
    is_other = bool(token) and holder_of(folder) != token
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, (socket.gethostname(), is_other))
    others = [f"rank {rank} on {host}" for rank, (host, other) in enumerate(of_ranks) if other]
    if others:
        more = f" and {len(others) - NAMED} ranks more" if len(others) > NAMED else ""
        raise ValueError(
            f"All ranks save into one folder, got --dump_folder {folder}, in which "
            f"{', '.join(others[:NAMED])}{more} cannot see {LOCK} of rank 0 on {of_ranks[0][0]}: "
            f"name a folder that all hosts share, or save nothing (--checkpoint.no-enable)."
        )


def _placeless(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """A fingerprint without the folder of its files, and without traces of their download."""
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
    if not dist.is_initialized():
        return  # one process, which is like itself
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
