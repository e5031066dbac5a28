"""The masks of a model's attention, with the number of layers of each: what layouts balance."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from dtcp.mixer import Mixer
from dtcp.mixer_metadata import MixerKinds
from dtcp.sequence.masks import (
    And,
    AttentionChunks,
    Bidirectional,
    BlockBidirectional,
    Causal,
    Mask,
    Or,
    SlidingWindow,
)
from dtcp.softmax.mixer import CrossAttention, GatherSharedKV, MaskedMixer


def masks_of(kinds: MixerKinds) -> Mapping[Mask, int]:
    """How often a model attends under each mask; once under Causal() where it has no such mixer.

    Layers of one mask count alike, whatever their heads. Attention to another sequence is left
    out, whose work is not that of this one's documents. Of images in text it is the mask of text:
    what their tokens see more is little, and a row cut wherever one starts has many pieces.
    """
    by_mask = kinds.remembered(_by_mask)
    layers = {mask: sum(mixer.layers for mixer in mixers) for mask, mixers in by_mask.items()}
    return layers or {Causal(): 1}


def attends_both_ways(kinds: MixerKinds) -> bool:
    """Whether each mask of a model's attention shows a token what comes after it, in text."""
    return all(_sees_ahead(mask) for mask in masks_of(kinds))


def _sees_ahead(mask: Mask) -> bool:
    if isinstance(mask, And):
        return _sees_ahead(mask.left) and _sees_ahead(mask.right)
    if isinstance(mask, Or):
        return _sees_ahead(mask.left) or _sees_ahead(mask.right)
    if isinstance(mask, SlidingWindow):
        return mask.right != 0
    return isinstance(mask, (Bidirectional, AttentionChunks))


def _by_mask(mixers: Sequence[Mixer]) -> Mapping[Mask, list[Mixer]]:
    by_mask, apart = defaultdict[Mask, list[Mixer]](list), (GatherSharedKV, CrossAttention)
    for mixer in mixers:
        if isinstance(mixer, MaskedMixer) and not isinstance(mixer, apart):
            by_mask[_of_text(mixer.mask)].append(mixer)
    return by_mask


def _of_text(mask: Mask) -> Mask:
    if isinstance(mask, And):
        return And(_of_text(mask.left), _of_text(mask.right))
    if isinstance(mask, Or):
        sides = [x for x in (mask.left, mask.right) if not isinstance(x, BlockBidirectional)]
        of_images = len(sides) == 1 and sides[0].sees_itself
        return _of_text(sides[0]) if of_images else mask
    return mask
