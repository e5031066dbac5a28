"""Why a mixer cannot carry out an attention call of transformers, in sentences."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dtcp.huggingface.block_attention import BLOCK_INDICES, PickedBlocks
from dtcp.huggingface.compressed_attention import window_of
from dtcp.huggingface.distance_bias import BIASES, is_of_bias
from dtcp.huggingface.latents import hands_on_latents
from dtcp.huggingface.registry import PROJECTION
from dtcp.sequence.masks import Bidirectional, Causal, Mask

HARMLESS = (
    *("position_ids", "use_cache", "is_causal", "sliding_window", "output_router_logits"),
    "logits_to_keep",
)
"""Arguments of an attention call that repeat what mask, positions and model already say."""
WRITTEN_AGAIN = ("num_selected", "pooled", "compressed", "relative_bias")
"""Arguments of attention calls in rewritten forwards (own_attention.py)."""
BY_DISTANCE = ("slope", "relative_bias", *BIASES)
"""Arguments that add to a score by how far a key is from the query."""
BY_PADDING = (
    "it says is_causal=False and is handed a causal mask, which transformers leaves out where sdpa "
    "attends and no row is padded, so that queries see both sides in some batches alone: clear "
    "use_bidirectional_attention of its config."
)
REMEDY = "write it with a mixer (docs/add_a_model.md)"

MEANT: Mapping[str, str] = {
    "indices": "keys that an indexer chooses for each query, otherwise than LightningIndexer does",
    "position_bias": "a bias of scores that does not go by distance in T5's buckets",
}
"""The meaning of refused arguments of attention calls."""


def problems_of(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    mask: Mask | None,
    arguments: dict[str, Any],
    *,
    cross: bool,
    merged: bool,
    config: Any,
) -> list[str]:
    """Why no mixer can carry out an attention call, in sentences; empty if one can.

    Args:
        config: of the module, or else of its model.
        q, k: [B, L, H or G, D].
        mask: what it lets queries see; None if that is not known.
        cross: whether keys are of an encoder's tokens.
        merged: whether keys are of both sequences.
    """
    known = ("scaling", "dropout", "s_aux", "softcap", "slope", *WRITTEN_AGAIN, *HARMLESS)
    unknown = [
        key
        for key, value in arguments.items()
        if key not in known and value is not None and value is not False
        if key not in BIASES or not is_of_bias(value)
        if not isinstance(value, PickedBlocks)
    ]
    of_keys = _problem_of_keys(q, k, mask, cross=cross, merged=merged)
    problems = [of_keys] if of_keys else []
    if arguments.get("dropout"):
        problems.append(
            f"dropout={arguments['dropout']} in training would depend on the mesh: set "
            f"{_rates(config, arguments['dropout'])} = 0.0."
        )
    if unknown:
        meant = ", ".join(f"{key} ({MEANT.get(key, 'unknown')})" for key in unknown)
        problems.append(f"it is called with {meant}, which no mixer honours: {REMEDY}.")
    picked = arguments.get(BLOCK_INDICES)
    if isinstance(picked, PickedBlocks) and not picked.kind.fits(picked.picked_by, k.shape[2]):
        problems.append(
            f"its indexer picks blocks for {picked.picked_by.q.shape[2]} heads, and the keys that "
            f"are read have {k.shape[2]}: give its config one index head for each."
        )
    problems += _problems_of_picking(module, mask, arguments)
    if arguments.get("compressed") is not None and mask is not None and not window_of(mask):
        problems.append(
            f"compressed entries are read beside a window of keys up to the query's, and its mask "
            f"is {mask}: give its config a sliding_window."
        )
    return problems


def _rates(config: Any, rate: float) -> str:
    """The fields of a config that attention's dropout may come from, as code."""
    fields = [key for key, x in vars(config).items() if "drop" in key and x == rate]
    of_attention = [key for key in fields if "att" in key]
    return " and ".join(f"config.{key}" for key in of_attention or fields) or "that of its config"


def _problems_of_picking(
    module: nn.Module, mask: Mask | None, arguments: dict[str, Any]
) -> list[str]:
    """Why a mixer cannot read what an indexer picks, in sentences."""
    problems = []
    picks = arguments.get("num_selected") or arguments.get(BLOCK_INDICES) is not None
    if picks and mask is not None and mask != Causal():
        problems.append(
            f"an indexer picks tokens of a document up to the query's, and its mask is {mask}: "
            f"{REMEDY}."
        )
    if arguments.get("num_selected") and not hands_on_latents(module):
        problems.append(
            f"it reads the latents of the tokens that an indexer picks, and its {PROJECTION} is "
            f"no plain projection: leave adapters and biases out of that."
        )
    pool_len, reads_tail = arguments.get("pooled") or (1, True)
    if pool_len > 1 and not reads_tail:
        problems.append(
            f"its indexer picks pools of {pool_len} tokens and no others, so that the first "
            f"{pool_len - 1} queries of a document read nothing, of which transformers makes what "
            f"its kernel does: set index_kpool_always_select_tail = True in its config."
        )
    return problems


def _problem_of_keys(q: Tensor, k: Tensor, mask: Mask | None, *, cross: bool, merged: bool) -> str:
    """Why queries see anything but an interval of one sequence's keys; empty if they do not."""
    if cross and mask != Bidirectional():
        return (
            f"its queries see a part of the encoder's tokens, by {mask}, and only attention to all "
            f"of them is sharded: {REMEDY}."
        )
    if cross:
        return ""
    if merged:
        return (
            f"its queries meet the tokens of both sequences in one softmax, and no mixer's keys "
            f"are of two sequences: {REMEDY}."
        )
    if k.shape[1] != q.shape[1]:
        return (
            f"{q.shape[1]} queries meet {k.shape[1]} keys (cross-attention to other tokens than an "
            f"encoder's, or a cache), and only attention to the tokens of a sequence is sharded: "
            f"{REMEDY}."
        )
    if mask is None:
        return (
            f"its mask is not one interval of keys around a token, or not made by "
            f"transformers.masking_utils of positions alone, so its meaning is not known: {REMEDY}."
        )
    return ""
