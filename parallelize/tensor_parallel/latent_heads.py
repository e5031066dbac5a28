"""Heads of latent attention split over tp, while the latents they are made of are whole."""

from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ParallelStyle

from dtcp.huggingface.registry import MIXER
from dtcp.parallelize.tensor_parallel.distribute import distribute_parameter
from dtcp.parallelize.tensor_parallel.regions import copy_to_region
from dtcp.softmax.latent import LatentMixer

_EXPAND = "dtcp_expand_kv_of_all"
"""Where a module keeps the method that it made keys and values by before."""


@dataclass
class LatentHeads(ParallelStyle):
    """Sum the gradients of a token's latent and rotary key, which the heads of all ranks read.

    For a module whose projections to heads are split column-wise and whose others are whole. Where
    it projects latents itself, its projection sums their gradient.

    Args:
        sinks: the name of the module's sinks, one per head, which are split with the heads; empty
            for none.

    Traffic per rank: backward, an all-reduce of rotary keys, and of latents if its mixer has them;
    in fp32 where its style has that reduce_dtype.
    """

    sinks: str = ""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if self.sinks:
            distribute_parameter(module, self.sinks, device_mesh, Shard(0))
        attention: Any = module
        hands_on = isinstance(getattr(attention, MIXER, None), LatentMixer)

        def of_own_heads(self: Any, kv_nope: Tensor, k_rot: Tensor) -> Any:
            if hands_on:
                mixer: LatentMixer = getattr(self, MIXER)
                kv_nope, k_rot = mixer.as_summed(kv_nope), mixer.as_summed(k_rot)
                kv_nope = copy_to_region(kv_nope, device_mesh)
            return getattr(self, _EXPAND)(kv_nope, copy_to_region(k_rot, device_mesh))

        vars(attention)[_EXPAND] = attention.expand_kv
        attention.expand_kv = MethodType(of_own_heads, attention)
        return module
