"""Libraries of GPU kernels that carry tokens to experts, each behind the same four calls."""

import importlib
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec

from dtcp.experts.libraries.deep_ep import DeepEP
from dtcp.experts.libraries.hybrid_ep import HybridEP
from dtcp.experts.libraries.types import Handle, TokenLibrary

__all__ = ["Handle", "TokenLibrary", "installed_libraries", "library_for", "library_of"]

ALL_TO_ALL, AUTO = "all_to_all", "auto"
LIBRARIES: Mapping[str, type[DeepEP] | type[HybridEP]] = {"deep_ep": DeepEP, "hybrid_ep": HybridEP}
"""By the names that torchtitan has for them, but for the underscore."""


def library_for(exchange: str, device_type: str) -> str:
    """The library that an exchange of this name goes by; empty for an all-to-all of torch.

    Raises:
        ValueError: no such exchange, or a library that is not installed.
    """
    if exchange not in (AUTO, ALL_TO_ALL, *LIBRARIES):
        raise ValueError(
            f"Tokens travel to experts by {AUTO!r}, {ALL_TO_ALL!r}, 'deep_ep' or 'hybrid_ep', got "
            f"exchange={exchange!r}: choose one."
        )
    if exchange == ALL_TO_ALL or (exchange == AUTO and device_type != "cuda"):
        return ""
    installed = installed_libraries()
    if exchange == AUTO:
        return installed[0] if installed else ""
    if exchange not in installed:
        raise ValueError(
            f"Tokens travel by a library that is there, got exchange={exchange!r} without "
            f"deep_ep.{LIBRARIES[exchange].needs}: install {LIBRARIES[exchange].source}, or choose "
            f"{ALL_TO_ALL!r}."
        )
    return exchange


def installed_libraries() -> list[str]:
    """Names of the libraries that this Python has: one package, of which each is a branch."""
    if find_spec("deep_ep") is None:
        return []
    has = dir(importlib.import_module("deep_ep"))
    return [name for name, library in LIBRARIES.items() if library.needs in has]


@cache
def library_of(name: str, group: str) -> TokenLibrary:
    """The library on a process group, whose buffers live as long as the process."""
    return LIBRARIES[name](group)
