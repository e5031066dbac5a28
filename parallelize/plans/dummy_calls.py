"""How a module of a model of transformers is called with random numbers, and with which sizes."""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import combinations
from types import CodeType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dtcp.huggingface.distance_bias import BIASES
from dtcp.huggingface.own_attention import own_values, written_again
from dtcp.parallelize.tensor_parallel import MEMORY

TABLES, POSITIONS = "position_embeddings", "position_ids"
"""The arguments with cosines and sines of positions, and with positions."""
MOST_SIZES = 7
OF_ONE_HEAD = re.compile(r"head_(dim|size)$")
"""Sizes that are the same on all ranks."""


def dummy_calls(
    forward: Any, module: Any, tokens: int, width: int, rotary: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Arguments to call a forward with: tokens where it needs such, else nothing, or tokens of
    another sequence.

    Args:
        width: channels of a token.
        rotary: widths that tables of positions may have.
    """
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    named = [x for x in parameters if x.kind in (x.POSITIONAL_OR_KEYWORD, x.KEYWORD_ONLY)]
    call: dict[str, Any] = {}
    for number, each in enumerate(named):
        is_tensor = each.annotation in (Tensor, each.empty) or number == 0
        if number == 0 or each.default is each.empty:
            shape = 1, tokens, width
            call[each.name] = torch.randn(shape, requires_grad=True) if is_tensor else None
    if "layer_idx" in call:
        call["layer_idx"] = getattr(module, "layer_idx", None)
    names = {each.name for each in named}
    if POSITIONS in names:
        call[POSITIONS] = torch.arange(tokens)[None]
    # Else they would be looked up for all pairs of tokens.
    call |= {name: torch.zeros(()) for name in BIASES if name in names - call.keys()}
    tables = [tuple(torch.randn(2, 1, tokens, wide).unbind()) for wide in rotary]
    with_tables = [{TABLES: each} for each in tables if TABLES in names]
    others = torch.randn(1, tokens - 2, width, requires_grad=True)
    for beside in ({}, *({name: others} for name in MEMORY if name in names)):
        yield from ({**call, **beside, **each} for each in (*with_tables, {}))


def rotary_widths(model: nn.Module) -> list[int]:
    """Widths of a model's tables of positions, which have twice as many channels as frequencies."""
    names = (name for name, _ in model.named_buffers() if name.endswith("inv_freq"))
    return sorted({2 * model.get_buffer(name).shape[-1] for name in names})


def sizes_of_heads(forward: Any, module: nn.Module, tp: int) -> Iterator[Mapping[str, int]]:
    """Sizes that a rank's heads may have, of what a module reads of itself: the fewest first."""
    sizes: dict[str, int] = {}
    config, arguments = getattr(module, "config", None), SimpleNamespace(**_given(module))
    for name in sorted(_names(forward, module), key=lambda name: ("head" not in name, name)):
        for owner, prefix in ((module, ""), (arguments, ""), (config, "config.")):
            size = None if OF_ONE_HEAD.search(name) else getattr(owner, name, None)
            if type(size) is int and size > 1 and (size % tp == 0 or tp % size == 0):
                sizes[prefix + name] = max(1, size // tp)
    chosen = list(sizes)[:MOST_SIZES]
    for count in range(len(chosen) + 1):
        for names in combinations(chosen, count):
            yield {name: sizes[name] for name in names}


def _names(forward: Any, module: nn.Module) -> set[str]:
    """Names that a forward reads, and those that the methods it calls read."""
    names = _names_in(forward.__code__)
    for name in tuple(names):
        method = inspect.unwrap(getattr(type(module), name, None) or forward)
        code = getattr(method, "__code__", None)
        names |= set() if code is None else _names_in(code)
    return names


def _names_in(code: CodeType) -> set[str]:
    inside = (each for each in code.co_consts if isinstance(each, CodeType))
    return set(code.co_names).union(*map(_names_in, inside))


@torch.no_grad()
def is_elementwise(module: nn.Module, width: int, tp: int) -> bool:
    """Whether a module of single numbers does with some channels what it does with all."""
    parameters = list(module.parameters())
    if any(p.numel() != 1 for p in parameters):
        return False
    memo: dict[int, Any] = {id(p): nn.Parameter(torch.rand(p.shape)) for p in parameters}
    tried, x = deepcopy(module, memo), torch.randn(1, 7, width)
    parts = [tried.forward(part) for part in x.chunk(tp, -1)]
    return torch.allclose(torch.cat(parts, -1), tried.forward(x), rtol=1e-5)


def dummy_tensors(module: nn.Module) -> dict[str, Any]:
    """What a module has of its own, made up where it is a parameter or a table."""
    tensors = {
        **dict(module.named_parameters(recurse=False)),
        **dict(module.named_buffers("", False)),
    }
    own: dict[str, Any] = {
        name: torch.randn(x.shape).requires_grad_(isinstance(x, nn.Parameter))
        for name, x in tensors.items()
        if x.is_floating_point()
    }
    return own | _given(module)


def _given(module: nn.Module) -> dict[str, Any]:
    """What a module is given whose forward is written again."""
    return {} if written_again(module) is None else own_values(module)
