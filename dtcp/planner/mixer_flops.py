"""FLOPs of our ops; of mixers, for the keys that queries see, since kernels skip the rest."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dtcp._torch.ops import OpOverload
from dtcp.distributed.dtensor_rules import bind
from dtcp.kernels.sparse.block_indexer import BlockSight
from dtcp.kernels.sparse.types import Sight
from dtcp.softmax.inputs import AttentionInputs
from dtcp.softmax.joined_shards import UlyssesMetadata
from dtcp.softmax.metadata import KeyExchangeMetadata

CHUNK = 64
"""Tokens that kernels of the delta rule work on at once."""
OF_TRANSFORMERS = frozenset(
    [
        "aten::_grouped_mm",
        "transformers::grouped_mm_fallback",
        "transformers::grouped_mm_fallback_backward",
    ]
)
"""Matmuls of experts in transformers' models, which torch's counter does not know (2.13)."""
GROUPED_PRODUCTS = OF_TRANSFORMERS | {"dtcp::grouped_linear", "dtcp::grouped_weight_gradient"}
"""Matmuls of experts, by name of the op."""
BACKWARD = 2.5
"""Matmuls of attention's backward over those of its forward: five for two."""
MADE_AGAIN = 3
"""Products by which backward makes keys of latents again and brings their gradients back."""


def mixer_flops(op: OpOverload, args: Sequence[Any]) -> int:
    """FLOPs of one call; 0 for an op that computes nothing to speak of."""
    if op.name() in OF_TRANSFORMERS:
        return _grouped_mm(args[0], args[1], backward=op.name().endswith("_backward"))
    name = op.name().partition("::")[2]
    backward = name.endswith("_backward")
    name = name.removesuffix("_backward")
    call = bind(op, args, {})
    if name in ("gated_delta_rule", "gated_linear_attention"):
        return _delta_rule(call["q"], call["v"], backward=backward)
    if name == "sparse_attention":
        return _sparse(call, backward=backward)
    if name == "attention" or name.endswith("_attention"):
        return _attention(name, call, backward=backward)
    if name == "grouped_linear":
        rows, weight = call["x"].shape[0], call["weight"].shape
        return 2 * rows * weight[1] * weight[2]
    if name == "grouped_weight_gradient":
        grad, x = call["grad"].shape, call["x"].shape
        return 2 * grad[0] * grad[1] * x[1]
    if name == "select_entries":
        return _indexer(call["q"], call["tiles"], call["num_selected"])
    if name == "select_blocks":
        tiles = BlockSight(*call["sight"]).tiles
        return _indexer(call["q"], tiles, call["num_blocks"] * call["block_len"])
    return 0


def _grouped_mm(a: Tensor, b: Tensor, *, backward: bool) -> int:
    """Where one of both is in groups, each row or column of the other meets one of them."""
    groups = a.shape[0] if a.ndim == b.ndim == 3 else 1
    forward = 2 * groups * a.shape[-2] * a.shape[-1] * b.shape[-1]
    return 2 * forward if backward else forward


def _attention(name: str, call: Mapping[str, Any], *, backward: bool) -> int:
    q, up, metadata = call["q"], call["up"], call["metadata"]
    x = AttentionInputs(q, call["k"], call["v"], up=up)
    out = call["grad_out"] if backward else q
    (rows, length, heads), key_dim = out.shape[:3], q.shape[-1]
    value_dim = out.shape[-1] if backward else x.value_width
    shared = 1
    if name.startswith("ulysses"):
        # Its metadata are of the whole row (of a group's part of it), for a share of the heads.
        metadata = metadata[_OUTER:]
        shared = max(1, metadata[0].shape[-1] // length)
    # What the metadata of every strategy start with.
    first_key, last_key = metadata[:2]
    pairs = int((last_key.long() - first_key.long() + 1).clamp(min=0).sum())
    # The metadata of a line are of all its rows; else rows that are alike share theirs.
    rows = rows if first_key.shape[-1] <= length * shared else 1
    alike = rows // first_key.shape[-2]
    forward = 2 * pairs * alike * heads * (key_dim + value_dim) // shared
    made = 0
    if up is not None:
        # Of latents, wherever these come from; of one device the op is given keys and values.
        made = 2 * rows * sum(KeyExchangeMetadata.of_tensors(metadata).key_counts) * up.numel()
    return int(forward * BACKWARD) + MADE_AGAIN * made if backward else forward + made


_OUTER = list(UlyssesMetadata.__annotations__).index("outer")
"""Tensors of Ulysses' own in front of those that the strategy inside reads."""


def _delta_rule(q: Tensor, v: Tensor, *, backward: bool) -> int:
    batch, length, heads, value_dim = v.shape
    key_dim = q.shape[-1]
    tokens = batch * length * heads
    # Inside a chunk: scores and what they read; across: the state read, corrected and written.
    forward = tokens * (4 * CHUNK * (key_dim + value_dim) + 6 * key_dim * value_dim)
    return 2 * forward if backward else forward


def _sparse(call: Mapping[str, Any], *, backward: bool) -> int:
    q, selected, sight = call["q"], call["selected"], Sight(*call["sight"])
    keys, entries = (run[..., 1] - run[..., 0] for run in (sight.key_run, sight.entry_run))
    if call["entries"] is None:
        entries = entries[..., :0]
    if selected is not None:
        entries = entries.clamp(max=selected.shape[-1])
    pairs = int(keys.sum()) + int(entries.sum())
    heads, dim = q.shape[2:]
    value_dim = call["out"].shape[-1] if backward else call["value_dim"]
    forward = 2 * pairs * heads * (dim + value_dim)
    return int(forward * BACKWARD) if backward else forward


def _indexer(q: Tensor, tiles: Tensor, num_selected: int) -> int:
    """Of whole tiles, as they are scored; one that sees no more than it may select is not."""
    start, stop, _, _, low, high = tiles.long().unbind(-1)
    scored = (stop - start) * (high - low) * (high - low > num_selected)
    return 2 * int(scored.sum()) * q.shape[2] * q.shape[3]
