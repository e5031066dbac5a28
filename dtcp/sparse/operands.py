"""What compressed sparse attention is called with, held against itself and its batch."""

from typing import Any

import torch
from torch import Tensor

from dtcp.kernels.sparse.pooling import Prepool
from dtcp.sequence.arguments import FLOATS, check_tensor
from dtcp.sparse.metadata import Compression

SUBJECT = "Compressed sparse attention"


def check_sparse_operands(
    q: Tensor,
    keys: Tensor,
    sink: Tensor,
    tokens: Prepool | None,
    index: Any,
    compression: Compression | None,
) -> None:
    """Refuse operands of other tokens, channels or dtypes, and those that nobody reads.

    A bias of another number of places would pool other windows, one of fewer dims be added to all.

    Args:
        index: an Index of the mixer's, or None.
    Raises:
        TypeError: no tensors, or dtypes that do not go together.
        ValueError: other shapes, or operands that the mixer does not read.
    """
    check_tensor(SUBJECT, shape="[B, L, H, D]", ndim=4, q=q)
    rows, heads, channels = q.shape[:2], q.shape[2], q.shape[3]
    parts: dict[str, tuple[Any, tuple[int, ...]]] = {
        "keys": (keys, (*rows, channels)),
        "sink": (sink, (heads,)),
    }
    _check_given(tokens, index, compression)
    if compression is not None and tokens is not None:
        parts |= _pooled("tokens", tokens, rows, channels, compression)
    if compression is not None and index is not None:
        check_tensor(SUBJECT, shape="[B, L, H, D]", ndim=4, **{"index.q": index.q})
        width = index.q.shape[3]
        parts["index.q"] = (index.q, (*rows, index.q.shape[2], width))
        parts["index.weight"] = (index.weight, (*rows, index.q.shape[2]))
        parts |= _pooled("index.keys", index.keys, rows, width, compression)
    for name, (x, shape) in parts.items():
        if not isinstance(x, Tensor):
            # Spelt here alone: traced code has no text for a size that changes.
            check_tensor(SUBJECT, shape=str(list(shape)), **{name: x})
        if x.shape != shape:
            raise ValueError(
                f"Every operand of compressed sparse attention fits its queries, got {name}.shape="
                f"{tuple(x.shape)} with q.shape={tuple(q.shape)}: give {shape}."
            )
    _check_dtypes(q, {name: x for name, (x, _) in parts.items()})


def _check_given(tokens: Any, index: Any, compression: Compression | None) -> None:
    selects = compression is not None and compression.selected is not None
    if (tokens is None) != (compression is None) or (index is None) == selects:
        raise ValueError(
            f"Compressed sparse attention reads tokens to pool if it has a compression, and an "
            f"index if that selects, got tokens={'None' if tokens is None else 'given'}, "
            f"index={'None' if index is None else 'given'} with {compression}: leave out what is "
            f"not read."
        )
    for name, x, fields in (
        ("tokens", tokens, Prepool._fields),
        ("index", index, ("q", "weight", "keys")),
    ):
        if x is not None and not all(hasattr(x, field) for field in fields):
            raise TypeError(
                f"{SUBJECT} reads {', '.join(fields)}, got {name} of type {type(x).__name__}: "
                f"give a Prepool as tokens, and an Index."
            )


def _pooled(
    name: str, x: Any, rows: torch.Size, channels: int, compression: Compression
) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """What is pooled, and the shape it should have."""
    wide = channels * (2 if compression.overlap else 1)
    return {
        f"{name}.value": (x.value, (*rows, wide)),
        f"{name}.gate": (x.gate, (*rows, wide)),
        f"{name}.bias": (x.bias, (compression.ratio, wide)),
    }


def _check_dtypes(q: Tensor, parts: dict[str, Tensor]) -> None:
    """Queries, keys and what becomes entries are of one floating dtype, the rest of any."""
    alike = {"q": q.dtype, "keys": parts["keys"].dtype}
    if "tokens.value" in parts:
        alike["tokens.value"] = parts["tokens.value"].dtype
    others = {name: x.dtype for name, x in parts.items() if x.dtype not in FLOATS}
    if others or q.dtype not in FLOATS or len(set(alike.values())) > 1:
        raise TypeError(
            f"Queries, keys and pooled tokens have one floating dtype, and other operands a "
            f"floating one, got {alike | others}: convert them."
        )
