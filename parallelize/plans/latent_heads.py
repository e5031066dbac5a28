"""Multi-head latent attention of transformers by heads: what makes heads is split, latents are not.

split     q_b_proj or q_proj, kv_b_proj, gates of heads and sinks, o_proj by its inputs
whole     what makes latents of a token, and their norms: far smaller, and read by all heads; an
          indexer, whose choice is that of all heads
"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle

from dtcp.huggingface.latents import makes_keys_of_latents
from dtcp.huggingface.picking_attention import OWN_INDEXER
from dtcp.huggingface.recurrent_layers import kernel_names
from dtcp.parallelize.tensor_parallel import LatentHeads

COLWISE, ROWWISE, WHOLE = "colwise", "rowwise", "whole"
OF_HEADS = ("q_proj", "q_b_proj", "q_gate_proj", "kv_b_proj", "g_proj", "gate_proj")
OF_LATENTS = (
    *("q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm"),
    "k_rope_only_layernorm",
)
OUT, SINKS = "o_proj", "sinks"


def latent_heads(
    modules: Mapping[str, nn.Module], tp: int
) -> tuple[dict[str, str], dict[str, ParallelStyle]]:
    """Roles of the layers of latent attention, and styles of the modules that hold them.

    A module of another form, or with heads that tp does not divide, is left out.
    """
    roles: dict[str, str] = {}
    styles: dict[str, ParallelStyle] = {}
    for name, module in modules.items():
        if makes_keys_of_latents(module) and _is_known(module, tp):
            parts = {key for key, each in module.named_children() if _has_parameters(each)}
            roles |= {f"{name}.{part}": _role(part) for part in parts}
            roles |= {each: WHOLE for each in modules if each.startswith(f"{name}.{OWN_INDEXER}.")}
            own = [key for key, _ in module.named_parameters(recurse=False)]
            roles |= dict.fromkeys([name] if own else [], WHOLE)
            styles[name] = LatentHeads(*own)
    return roles, styles


def _role(part: str) -> str:
    if part == OUT:
        return ROWWISE
    return COLWISE if part in OF_HEADS else WHOLE


def _is_known(module: Any, tp: int) -> bool:
    """Whether a module is made of known parts, by heads that tp divides, and counts no heads."""
    own = {key for key, _ in module.named_parameters(recurse=False)}
    parts = {key: each for key, each in module.named_children() if _has_parameters(each)}
    heads = getattr(module, "num_heads", 1)
    by_heads = all(
        part.out_features % heads == 0
        for key, part in parts.items()
        if key in OF_HEADS and hasattr(part, "out_features")
    )
    counts = {"num_heads", "num_attention_heads"} & kernel_names(module)
    known = parts.keys() <= {*OF_HEADS, *OF_LATENTS, OUT, OWN_INDEXER}
    return known and by_heads and own <= {SINKS} and not counts and heads % tp == 0


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
