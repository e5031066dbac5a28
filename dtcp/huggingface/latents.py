"""Multi-head latent attention of transformers: latents are passed to the mixer as they are.

Models of the DeepSeek-V2 line make keys and values from latents in a method that all copy from one
model. Where a module has that very method, with a plain projection, the module may skip it: its
mixer makes keys and values itself, where their latents arrive.
"""

from types import MethodType
from typing import Any

from torch import Tensor, nn

from dtcp.huggingface.picking_attention import INDEXER, OWN_INDEXER
from dtcp.huggingface.picking_forms import FORMS
from dtcp.huggingface.quantized import is_quantized_layer
from dtcp.huggingface.registry import MIXER, PROJECTION
from dtcp.softmax.mixer import LatentAttention, SoftmaxAttention
from dtcp.sparse_latent import LightningIndexer, PooledIndexer


def hands_on_latents(attention: nn.Module) -> bool:
    """Whether the module's keys and values are made as LatentAttention makes them.

    Not where its projection has been replaced, by one with adapters say, or is quantized.
    """
    projection: Any = getattr(attention, PROJECTION, None)
    plain = type(projection) is nn.Linear and getattr(projection, "bias", None) is None
    plain = plain and not is_quantized_layer(projection)
    return plain and makes_keys_of_latents(attention)


def makes_keys_of_latents(attention: nn.Module) -> bool:
    """Whether the module has the method by which models of the DeepSeek-V2 line make keys."""
    own: Any = getattr(type(attention), "expand_kv", None)
    if own is None:
        return False
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    code, known = own.__code__, DeepseekV3Attention.expand_kv.__code__
    return (code.co_code, code.co_names) == (known.co_code, known.co_names)


def exchange_latents(attention: nn.Module) -> None:
    """Replace a module's mixer by one that exchanges latents, and pass it these."""
    mixer = attention.get_submodule(MIXER)
    assert type(mixer) is SoftmaxAttention
    latent = LatentAttention(
        mixer.mask, scale=mixer.scale, softcap=mixer.softcap, kernel=mixer.kernel
    )
    attention.add_module(MIXER, latent)
    _hand_on_latents(attention)


def read_picked_latents(attention: nn.Module, num_selected: int) -> None:
    """Make a module whose mixer reads the latents of picked tokens pass them on, and pick them.

    A module without an indexer reads what the layer before it read.
    """
    indexer: Any = getattr(attention, OWN_INDEXER, None)
    if indexer is not None:
        attention.add_module(INDEXER, _indexer(attention, indexer, num_selected))
    _hand_on_latents(attention)


def _indexer(attention: nn.Module, indexer: Any, num_selected: int) -> nn.Module:
    if not FORMS[type(attention).__name__].pools:
        return LightningIndexer(num_selected)
    return PooledIndexer(num_selected // indexer.index_kpool, indexer.index_kpool)


def _hand_on_latents(attention: nn.Module) -> None:
    # Bound to this very module, so that a deep copy has its own.
    attention.expand_kv = MethodType(_as_they_are, attention)  # type: ignore[assignment]


def _as_they_are(_: nn.Module, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    return kv_nope, k_rot
