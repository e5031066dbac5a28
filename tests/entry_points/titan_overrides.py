"""Overrides of somebody else's, for torchtitan's `override.imports`."""

from dataclasses import dataclass

from dtcp.torchtitan import compat as compat

from torchtitan.config.override import derive, override
from torchtitan.models.common.attention import GQAttention
from torchtitan.models.common.rope import ComplexRoPE


class WindowedGQAttention(GQAttention):
    @dataclass(kw_only=True, slots=True)
    class Config(GQAttention.Config):
        window: int = 8


class MixingRoPE(ComplexRoPE):
    @dataclass(kw_only=True, slots=True)
    class Config(ComplexRoPE.Config):
        pass


@override(target=GQAttention.Config)
def windowed(config):
    return derive(config, WindowedGQAttention.Config)


@override(target=ComplexRoPE.Config)
def mixing_rope(config):
    return derive(config, MixingRoPE.Config)
