"""What the attention of a Gemma 4 receives in a forward pass, by formula: ours and two others.

Received bytes of one rank, one document a row, batch 1, no tensor parallelism. A key that is
brought comes with its value: W = 2 * G * D elements a token, or G * D where keys are made from
values again.
"""

from collections.abc import Callable
from dataclasses import dataclass

from dtcp.models.gemma4 import Gemma4Config, LayerType
from dtcp.sequence.layout import SequenceLayout

LayerBytes = Callable[[Gemma4Config, SequenceLayout, int, int], int]
"""(config, layout, layer, rank) to bytes, in bfloat16."""


@dataclass(frozen=True)
class Total:
    """Bytes over all layers of a model: those of the rank that receives most, and the mean."""

    most: int
    mean: float


def total(config: Gemma4Config, layout: SequenceLayout, layer_bytes: LayerBytes) -> Total:
    """Sum over layers, for every rank."""
    sums = [
        sum(layer_bytes(config, layout, layer, rank) for layer in range(config.num_layers))
        for rank in range(layout.num_shards)
    ]
    return Total(max(sums), sum(sums) / len(sums))


def ours(
    config: Gemma4Config, layout: SequenceLayout, layer: int, rank: int, *, element: int = 2
) -> int:
    """Halos of windows, needed keys of global layers; nothing where keys are shared.

    min(W - 1, what lies before) a segment; one tensor of keys made from values, else two.
    """
    if config.reads_shared_kv(layer):
        return 0
    sliding = config.layer_types[layer] is LayerType.SLIDING
    tokens = needed_tokens(layout, rank, config.window - 1 if sliding else layout.seq_len)
    tensors = 1 if config.has_keys_from_values(layer) else 2
    return tokens * tensors * _row(config, layer, element)


def whole_chunk_ring(
    config: Gemma4Config, layout: SequenceLayout, layer: int, rank: int, *, element: int = 2
) -> int:
    """K and V of whole shards: ceil(W / L) of them for a window, all others for global layers.

    As NeMo Automodel's ring over contiguous shards does; layers that share keys send them again.
    """
    length, others = layout.shard_len, layout.num_shards - 1
    if config.layer_types[layer] is LayerType.SLIDING:
        others = min(others, -(-config.window // length))
    return others * length * 2 * _row(config, layer, element)


def all_gather(
    config: Gemma4Config, layout: SequenceLayout, layer: int, rank: int, *, element: int = 2
) -> int:
    """K and V of all other shards, whatever the mask. As torch's own context parallelism does."""
    tokens = (layout.num_shards - 1) * layout.shard_len
    return tokens * 2 * _row(config, layer, element)


def needed_tokens(layout: SequenceLayout, rank: int, left: int) -> int:
    """Tokens of other ranks among those that lie up to `left` places left of this rank's."""
    mine = layout.runs(rank)
    tokens, stop_before = 0, 0
    for start, stop in mine:
        # What a run reads begins after whatever the runs before it have read or are.
        tokens += start - max(start - left, stop_before, 0)
        stop_before = stop
    return tokens if left < layout.seq_len else mine[-1][1] - layout.shard_len


def _row(config: Gemma4Config, layer: int, element: int) -> int:
    heads = config.heads(layer)
    return heads.num_kv_heads * heads.head_dim * element
