"""The masks of a model's attention, with the number of layers of each: what layouts balance."""

from collections import Counter
from collections.abc import Mapping

from torch import nn

from dtcp.mixer import mixers_of
from dtcp.sequence.masks import Causal, Mask
from dtcp.softmax.mixer import CrossAttention, GatherSharedKV, MaskedMixer


def masks_of(model: nn.Module) -> Mapping[Mask, int]:
    """How often a model attends under each mask; once under Causal() where it has no such mixer.

    Layers of one mask count alike, whatever their heads. Attention to another sequence is left
    out, whose work is not that of this one's documents.
    """
    apart, layers = (GatherSharedKV, CrossAttention), Counter[Mask]()
    for mixer in mixers_of(model):
        if isinstance(mixer, MaskedMixer) and not isinstance(mixer, apart):
            layers[mixer.mask] += mixer.layers
    return layers or {Causal(): 1}
