"""FLOPs of our ops: of mixers from the keys that queries see, as of kernels that skip the rest."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dtcp._torch import OpOverload, argument_names

CHUNK = 64
"""Tokens that kernels of the delta rule work on at once."""
GROUPED_PRODUCTS = frozenset(["dtcp::grouped_linear", "dtcp::grouped_weight_gradient"])
"""Matmuls of experts, by name of the op."""
BACKWARD = 2.5
"""Matmuls of attention's backward over those of its forward: five for two."""


def mixer_flops(op: OpOverload, args: Sequence[Any]) -> int:
    """FLOPs of one call; 0 of an op that computes nothing to speak of."""
    name = op.name().partition("::")[2]
    backward = name.endswith("_backward")
    name = name.removesuffix("_backward")
    if name in ("gated_delta_rule", "gated_linear_attention"):
        return _delta_rule(args[1:] if backward else args, backward=backward)
    if name == "sparse_attention":
        return _sparse(args, backward=backward)
    if name == "attention" or name.endswith("_attention"):
        return _attention(name, op, args, backward=backward)
    if name == "grouped_linear":
        weight = args[1].shape
        return 2 * args[0].shape[0] * weight[1] * weight[2]
    if name == "grouped_weight_gradient":
        return 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
    if name == "select_entries":
        return _indexer(args)
    return 0


def _attention(name: str, op: OpOverload, args: Sequence[Any], *, backward: bool) -> int:
    named = dict(zip(argument_names(op), args, strict=False))
    tables, q, v = named["metadata"], named["q"], named["v"]
    out = named["grad_out"] if backward else q
    (rows, length, heads), key_dim = out.shape[:3], q.shape[-1]
    value_dim = out.shape[-1] if backward or v is None else v.shape[-1]
    shared = 1
    if name.startswith("ulysses"):
        # The tables are of the whole row (of a group's part of it), for a share of the heads.
        tables = tables[2:]
        shared = max(1, tables[0].shape[-1] // length)
    first, last = tables[0], tables[1]
    pairs = int((last.long() - first.long() + 1).clamp(min=0).sum())
    # Rows that are alike share their tables; those of a line have them all.
    alike = rows // first.shape[0] if first.shape[1] <= length * shared else 1
    forward = 2 * pairs * alike * heads * (key_dim + value_dim) // shared
    return int(forward * BACKWARD) if backward else forward


def _tensors(x: Sequence[Any]) -> bool:
    return bool(x) and all(isinstance(each, Tensor) for each in x)


def _delta_rule(args: Sequence[Any], *, backward: bool) -> int:
    q, _, v = args[:3]
    batch, length, heads, value_dim = v.shape
    key_dim = q.shape[-1]
    tokens = batch * length * heads
    # Inside a chunk: scores and what they read; across: the state read, corrected and written.
    forward = tokens * (4 * CHUNK * (key_dim + value_dim) + 6 * key_dim * value_dim)
    return 2 * forward if backward else forward


def _sparse(args: Sequence[Any], *, backward: bool) -> int:
    q, _, entries, selected = args[1:5] if backward else args[:4]
    sight = next(arg for arg in args if isinstance(arg, list | tuple) and _tensors(arg))
    window_first, first, last = sight[0], sight[1], sight[2]
    pairs = int((last.long() - window_first.long() + 1).clamp(min=0).sum())
    if selected is not None:
        pairs += selected.shape[0] * selected.shape[1] * selected.shape[2]
    elif entries is not None:
        seen = (last.long() - first.long() + 1).clamp(min=0).sum()
        ratio = max(1, round(sight[0].shape[0] * _row(sight) / max(1, entries.shape[1])))
        pairs += int(seen) // ratio
    heads, dim = q.shape[2:]
    forward = 4 * pairs * heads * dim
    return int(forward * BACKWARD) if backward else forward


def _row(sight: Sequence[Any]) -> int:
    """Tokens of a row, as far as the last one seen."""
    return int(sight[2].max()) + 1


def _indexer(args: Sequence[Any]) -> int:
    q, _, keys, first, last = args[:5]
    seen = int((last.long() - first.long() + 1).clamp(min=0).sum())
    share = keys.shape[1] / max(1, int(last.max()) + 1)
    return int(2 * seen * share * q.shape[2] * q.shape[3])
