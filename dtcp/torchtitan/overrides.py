"""Our attention inside torchtitan's own models, by its override registry: no model is edited.

    --override.imports dtcp.torchtitan.overrides.context_parallel_attention

A decoder of torchtitan calls `inner_attention(q, k, v, attention_masks=...)` on local shards. The
override puts a mixer there, and the metadata of the batch travels in place of the mask.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torchtitan.config.override import derive, override
from torchtitan.models.common.attention import FlexAttention
from torchtitan.models.common.decoder import Decoder
from torchtitan.protocols.module import Module

from dtcp.metadata import BatchMetadata
from dtcp.sequence.masks import Causal
from dtcp.softmax.mixer import SoftmaxAttention


class MixerAttention(Module):
    """A SoftmaxAttention where torchtitan has its inner attention."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        pass

    mixer: SoftmaxAttention

    def __init__(self, config: Config) -> None:
        super().__init__()

    def add_mixer(self) -> None:
        """Called after torchtitan has checked that all modules are of its own kind."""
        self.mixer = SoftmaxAttention(Causal())

    def forward(
        self,
        # torchtitan's sharding goes by these names.
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: BatchMetadata,
        scale: float | None = None,
        **_: Any,
    ) -> Tensor:
        if scale is not None:
            # A float of the module, not of the batch: constant in the graph.
            assert abs(scale * q_BLNH.shape[-1] ** 0.5 - 1) < 1e-6, scale
        return self.mixer(q_BLNH, k_BLNH, v_BLNH, attention_masks)


@override(target=FlexAttention.Config, description="attention over the context-parallel axis")
def context_parallel_attention(config: FlexAttention.Config) -> MixerAttention.Config:
    return derive(config, MixerAttention.Config)


def add_mixers(model: Decoder) -> None:
    """Give every overridden attention its mixer.

    Raises:
        ValueError: a layer still has torchtitan's attention.
    """
    for name, block in model.layers.items():
        inner: nn.Module = block.attention.inner_attention
        if not isinstance(inner, MixerAttention):
            raise ValueError(
                f"Every layer's attention is overridden, got layers.{name} with "
                f"{type(inner).__name__}: add --override.imports "
                f"dtcp.torchtitan.overrides.context_parallel_attention, and build the model with "
                f"attn_backend='flex'."
            )
        inner.add_mixer()
