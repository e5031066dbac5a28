"""Which style carries out the mixers of an attention module of transformers."""

from torch.distributed.tensor.parallel import ParallelStyle

from dtcp.huggingface.picking_attention import INDEXER
from dtcp.huggingface.recorder import SurveyedAttention
from dtcp.huggingface.registry import MIXER
from dtcp.softmax import AllGatherAttention, RingAttention
from dtcp.softmax.style import AttentionStyle
from dtcp.sparse import CompressedSparseCP
from dtcp.sparse_blocks import SparseBlockCP
from dtcp.sparse_latent import SparseLatentCP

BRING_ALL = (RingAttention, AllGatherAttention)
"""Strategies that bring all that a query may read, and so what an indexer may pick from."""


def mixer_styles(
    attention: SurveyedAttention, style: AttentionStyle, *, picks: bool
) -> dict[str, ParallelStyle]:
    """The styles of a module's mixers, by their names.

    Args:
        style: the strategy that the module was given.
        picks: whether the module has an indexer of its own.
    Raises:
        ValueError: a strategy that does not bring what an indexer may pick from.
    """
    own = carried_out_by(attention, style)
    styles: dict[str, ParallelStyle] = {f"{attention.name}.{MIXER}": own}
    return {f"{attention.name}.{INDEXER}": own, **styles} if picks else styles


def carried_out_by(
    attention: SurveyedAttention, style: AttentionStyle
) -> AttentionStyle | SparseLatentCP | SparseBlockCP | CompressedSparseCP:
    """What carries out the mixers of a module that was given a strategy, with the options of that.

    Raises:
        ValueError: as of `mixer_styles`.
    """
    if attention.window:
        return _entries_style(attention, style)
    if not attention.num_selected and not attention.blocks:
        return style
    kind = SparseBlockCP if attention.blocks else SparseLatentCP
    plain = AttentionStyle()
    if type(style) not in BRING_ALL or (style.tile, style.kernel) != (plain.tile, plain.kernel):
        raise ValueError(
            f"An indexer may pick any token of a document up to the query's, so {attention.name} "
            f"brings the {kind.summed} of all of these ({kind.__name__}), got {style}: give "
            f"RingAttention() or AllGatherAttention(), without tile and kernel, or leave attention "
            f"out."
        )
    return kind(
        boundary=style.boundary,
        ranks_per_node=style.ranks_per_node,
        reduce_dtype=style.reduce_dtype,
    )


def _entries_style(attention: SurveyedAttention, style: AttentionStyle) -> CompressedSparseCP:
    """The one there is for a window beside compressed entries, with the strategy's options.

    Raises:
        ValueError: a strategy that says how all keys of a query are brought.
    """
    options, plain = (_options(each) for each in (style, AttentionStyle()))
    if type(style) not in (RingAttention, AllGatherAttention) or options != plain:
        raise ValueError(
            f"A window of keys and compressed entries are brought in a way of their own "
            f"(CompressedSparseCP), got {style} for {attention.name}: give RingAttention() or "
            f"AllGatherAttention(), without tile, kernel and reduce_dtype, or leave attention out."
        )
    return CompressedSparseCP(boundary=style.boundary, ranks_per_node=style.ranks_per_node)


def _options(style: AttentionStyle) -> tuple[object, ...]:
    """Those that the style of entries has not."""
    return style.tile, style.kernel, style.reduce_dtype
