"""Our attention inside torchtitan's own models: a mixer where a layer has its inner attention.

A decoder of torchtitan calls `inner_attention(q, k, v, attention_masks=...)` on local shards. The
mixer stands there, and the metadata of the batch travel in place of the mask. What a layer asks of
its attention is read from its config (decoder_layers.py), before any rank starts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.decoder import Decoder
from torchtitan.protocols.module import Module

from dtcp.metadata import BatchMetadata
from dtcp.sequence.masks import Mask
from dtcp.softmax.mixer import SoftmaxAttention

OutTransform = Callable[[Tensor, Tensor], Tensor]


class MixerAttention(Module):
    """A SoftmaxAttention where torchtitan has its inner attention."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        mask: Mask
        """Which keys a query of this layer sees, within its document."""

        sinks: bool = False
        """Whether the layer hands over a score per head that takes its share of the softmax."""

    mixer: SoftmaxAttention
    _sharding_config: Any  # torchtitan's, set where a config is built

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.mask, self.sinks = config.mask, config.sinks

    def add_mixer(self, scale: float | None) -> None:
        """Called after torchtitan has checked that all modules are of its own kind."""
        self.mixer = SoftmaxAttention(self.mask, scale=scale)

    def parallelize(self, parallel_dims: ParallelDims) -> None:
        """As torchtitan's, but keys and values stay as they are on cp, where it gathers them.

        What a rank lacks is brought by the mixer's style. On tp nothing changes at this place.
        """
        config = self._sharding_config
        if config is not None:
            self._sharding_config = replace(config, in_dst_shardings=config.in_src_shardings)
        super().parallelize(parallel_dims)

    def forward(
        self,
        # torchtitan's sharding goes by these names.
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: BatchMetadata,
        scale: float | None = None,
        enable_gqa: bool = False,  # the mixer sees it by the shapes
        out_transform: OutTransform | None = None,
    ) -> Tensor:
        # Facts of the module, not of the batch: constants in the graph.
        if scale != self.mixer.scale:
            raise ValueError(
                f"A layer's scores have the scale that was read when its mixer was made, got "
                f"scale={scale} for {self.mixer}: set it before the model is parallelized."
            )
        sink = _sinks(out_transform) if self.sinks else None
        if out_transform is not None and sink is None:
            raise ValueError(
                f"Outputs are transformed where the layer's config says so, got "
                f"out_transform={out_transform} in a layer read as {self.mask}: write the layer "
                f"with a mixer of dtcp."
            )
        return self.mixer(q_BLNH, k_BLNH, v_BLNH, attention_masks, sink=sink)


def _sinks(out_transform: Any) -> Tensor | None:
    """The sinks of the layer whose method rescales outputs by them, local where tp shards heads.

    out * sigmoid(lse - sink) is a softmax with one more score, which the mixer computes itself.
    """
    if out_transform is None:
        return None
    sinks: Tensor = out_transform.__self__.sinks
    return sinks.to_local(grad_placements=sinks.placements) if isinstance(sinks, DTensor) else sinks


def add_mixers(model: Decoder) -> None:
    """Give every layer's attention its mixer.

    Raises:
        ValueError: a layer still has torchtitan's attention.
    """
    for name, block in model.layers.items():
        attention: nn.Module = block.attention
        inner = attention.inner_attention
        if not isinstance(inner, MixerAttention):
            raise ValueError(
                f"Every layer's attention is a mixer of dtcp, got layers.{name} with "
                f"{type(inner).__name__}: build the model from adopt_model(spec).model."
            )
        # GQAttention calls it scaling (None for head_dim ** -0.5), the others softmax_scale.
        scale = getattr(attention, "softmax_scale", getattr(attention, "scaling", None))
        inner.add_mixer(scale)
