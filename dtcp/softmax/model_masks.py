"""The masks of a model's attention, with the number of layers of each: what layouts balance."""

from collections import Counter
from collections.abc import Mapping

from torch import nn

from dtcp.mixer import mixers_of
from dtcp.sequence.masks import And, BlockBidirectional, Causal, Mask, Or
from dtcp.softmax.mixer import CrossAttention, GatherSharedKV, MaskedMixer


def masks_of(model: nn.Module) -> Mapping[Mask, int]:
    """How often a model attends under each mask; once under Causal() where it has no such mixer.

    Layers of one mask count alike, whatever their heads. Attention to another sequence is left
    out, whose work is not that of this one's documents. Of images in text it is the mask of text:
    what their tokens see more is little, and a row cut wherever one starts has many pieces.
    """
    apart, layers = (GatherSharedKV, CrossAttention), Counter[Mask]()
    for mixer in mixers_of(model):
        if isinstance(mixer, MaskedMixer) and not isinstance(mixer, apart):
            layers[mixer.mask] += mixer.layers
    of_text = Counter[Mask]()
    for mask, count in layers.items():
        of_text[_of_text(mask)] += count
    return of_text or {Causal(): 1}


def _of_text(mask: Mask) -> Mask:
    if isinstance(mask, And):
        return And(_of_text(mask.left), _of_text(mask.right))
    if isinstance(mask, Or):
        sides = [x for x in (mask.left, mask.right) if not isinstance(x, BlockBidirectional)]
        return _of_text(sides[0]) if len(sides) == 1 else mask
    return mask
