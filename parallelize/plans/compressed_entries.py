"""Which style carries out attention to compressed entries, in a module of transformers."""

from dtcp.huggingface.recorder import SurveyedAttention
from dtcp.softmax import AllGatherAttention, RingAttention
from dtcp.softmax.style import AttentionStyle
from dtcp.sparse import CompressedSparseCP


def entries_style(attention: SurveyedAttention, style: AttentionStyle) -> CompressedSparseCP:
    """The one there is, with the options of the strategy that the module was given.

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
