"""Attention and feed-forwards that transformers' plan says nothing of: split if a run shows how.

Each rank of tp is played: layers that widen give its part of random numbers, and the one that
narrows has to be handed its part of what it is handed on one device, while all else is what it is
there. Of attention, so must be the operands, by heads.

    attention      layers of queries, keys and values, and one that reads what attention gives
    feed-forward   layers of a block that are in no module of their own (fc1 and fc2)
"""

import inspect
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from dtcp.huggingface.distance_bias import TABLE, biased_attentions
from dtcp.parallelize.plans.adapters import adapted_layers
from dtcp.parallelize.plans.forward_code import has_parameters
from dtcp.parallelize.plans.stand_in_run import (
    StandInRun,
    calls_registry,
    everything,
    form_of,
)
from dtcp.parallelize.tensor_parallel.replicate_input import MEMORY

COLWISE, ROWWISE, WHOLE = "colwise", "rowwise", "whole"
BIAS_OF_HEADS = "bias_of_heads"
"""The role of a table with one column for each head."""
TOKENS, OTHER_TOKENS = 3, 5
_NO_BIAS = "position_bias"

Roles = dict[str, str]


def inferred_heads(
    model: nn.Module, modules: Mapping[str, nn.Module], known: Mapping[str, str], tp: int
) -> Roles:
    """Roles of the layers of attention, by module name, where tp divides heads.

    Args:
        known: roles of the layers that have one.
    """
    biased = {id(module) for module in biased_attentions(model)}
    tried: dict[tuple[object, ...], Roles] = {}
    roles: Roles = {}
    for name, module in modules.items():
        around, linears = _around(name, modules)
        if not calls_registry(module) or any(known.get(f"{around}.{part}") for part in linears):
            continue
        has_table = id(module) in biased
        kind = (*form_of(modules[around]), name[len(around) :], has_table)
        if kind not in tried:
            tried[kind] = _heads(modules[around], linears, tp, has_table=has_table)
        roles |= {f"{around}.{part}": role for part, role in tried[kind].items()}
    return roles


def inferred_blocks(modules: Mapping[str, nn.Module], known: Mapping[str, str], tp: int) -> Roles:
    """Roles of the feed-forward layers of blocks, by module name.

    Args:
        known: roles of the layers that have one.
    """
    tried: dict[tuple[object, ...], Roles] = {}
    roles: Roles = {}
    for name, module in modules.items():
        attends = [each for each in module.modules() if calls_registry(each)]
        parent = modules.get(name.rpartition(".")[0])
        if not isinstance(parent, nn.ModuleList) or module in attends or not attends:
            continue
        inside = _linears(module)
        free = {part: x for part, x in inside.items() if not known.get(f"{name}.{part}")}
        kind = (*form_of(module), *free)
        if kind not in tried:
            pair = _up_and_down(free, tp)
            ups, down = pair if pair is not None else ([], "")
            before = _beside(module, ups)
            is_split = down and _splits(module, free, down, tp, heads=False, others=before)
            named = {**dict.fromkeys(before, WHOLE), **dict.fromkeys(ups, COLWISE), down: ROWWISE}
            tried[kind] = named if is_split else {}
        roles |= {f"{name}.{part}": role for part, role in tried[kind].items()}
    return roles


def _up_and_down(linears: Mapping[str, nn.Module], tp: int) -> tuple[list[str], str] | None:
    """The layers that widen and the one that narrows, where a feed-forward is but these."""
    plain = {name: x for name, x in linears.items() if type(x) is nn.Linear}
    if len(plain) != len(linears) or len(plain) not in (2, 3):
        return None
    for down, layer in plain.items():
        ups = [name for name in plain if name != down]
        width, hidden = layer.in_features, layer.out_features
        fits = all((plain[n].in_features, plain[n].out_features) == (hidden, width) for n in ups)
        if fits and width > hidden and width % tp == 0:
            return ups, down
    return None


def _beside(module: nn.Module, ups: Sequence[str]) -> list[str]:
    """Modules with parameters beside layers that widen, in a module of theirs: a norm before."""
    around = tuple(f"{up.rpartition('.')[0]}." for up in ups if "." in up)
    inside = tuple(f"{up}." for up in ups)
    owners = (name for name, each in module.named_modules() if has_parameters(each))
    return [
        name for name in owners if name.startswith(around) and not f"{name}.".startswith(inside)
    ]


def _around(name: str, modules: Mapping[str, nn.Module]) -> tuple[str, dict[str, nn.Linear]]:
    """The module with all layers of an attention: itself, or the one around it, as BERT has it."""
    linears = _linears(modules[name])
    parent = name.rpartition(".")[0]
    if len(linears) != 3 or parent not in modules or calls_registry(modules[parent]):
        return name, linears
    return parent, _linears(modules[parent])


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    return adapted_layers(module, lambda x: isinstance(x, nn.Linear))


def _heads(
    module: nn.Module, layers: Mapping[str, nn.Linear], tp: int, *, has_table: bool
) -> Roles:
    """The roles of all layers in a module around attention; empty where it stays whole."""
    if len(layers) != 4:
        return {}
    for down in reversed(list(layers)):
        owners = [n for n, m in module.named_modules() if has_parameters(m)]
        others = [n for n in owners if not any(n == x or n.startswith(f"{x}.") for x in layers)]
        tables = [n for n in others if has_table and n == TABLE]
        whole = [n for n in others if n not in tables]
        divides = all(module.get_parameter(f"{n}.weight").shape[1] % tp == 0 for n in tables)
        if divides and _splits(module, layers, down, tp, heads=True, others=whole):
            ups = [name for name in layers if name != down]
            named = {**dict.fromkeys(tables, BIAS_OF_HEADS), **dict.fromkeys(whole, WHOLE)}
            return {**named, **dict.fromkeys(ups, COLWISE), down: ROWWISE}
    return {}


def _splits(
    module: nn.Module,
    layers: Mapping[str, nn.Linear],
    down: str,
    tp: int,
    *,
    heads: bool,
    others: Sequence[str] = (),
) -> bool:
    """Whether each rank of tp has its part of the work by its part of the layers."""
    if any(layers[name].out_features % tp for name in layers if name != down):
        return False
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        calls = _calls(module, next(iter(layers.values())).in_features)
        outputs = {n: torch.randn(OTHER_TOKENS, x.out_features) for n, x in layers.items()}
        called: set[str] = set()
        worked = 0
        for call, pairs in product(calls, (True, False)):
            whole = StandInRun(outputs, down, everything)
            whole.hands_pairs = pairs
            expected = _attempt(whole, module, call)
            if expected is None or down not in whole.inputs or bool(whole.operands) != heads:
                continue
            worked += 1
            called |= whole.inputs.keys()
            if not all(_is_part(whole, expected, module, call, rank, tp) for rank in range(tp)):
                return False
        return worked > 0 and called >= set(others)


def _calls(module: nn.Module, width: int) -> list[dict[str, Any]]:
    """What to call a module with: tokens, and where it takes such, tokens of another sequence."""
    taken = inspect.signature(inspect.unwrap(type(module).forward)).parameters
    own = [x for x in list(taken.values())[1:] if x.kind is x.POSITIONAL_OR_KEYWORD]
    call: dict[str, Any] = {x.name: None for x in own if x.default is x.empty}
    call[own[0].name] = torch.randn(1, TOKENS, width)
    if _NO_BIAS in taken:
        call[_NO_BIAS] = torch.zeros(())
    memory = torch.randn(1, OTHER_TOKENS, width)
    more = [{**call, name: memory} for name in MEMORY if name in taken]
    return [call, *more]


def _attempt(run: StandInRun, module: nn.Module, call: Mapping[str, Any]) -> Tensor | None:
    try:
        return run.run(module, **call)
    # Code of others, called as nobody promised that it could be: any class may come, and each
    # gives the same answer, that nothing is known of it. It then stays whole on each rank of tp,
    # which is exact, and a warning says so; an error of its own shows when it runs.
    except Exception:  # noqa: BLE001
        return None


def _is_part(
    whole: StandInRun,
    expected: Tensor,
    module: nn.Module,
    call: Mapping[str, Any],
    rank: int,
    tp: int,
) -> bool:
    def part(x: Tensor, dim: int) -> Tensor:
        return x.chunk(tp, dim)[rank] if x.shape[dim] % tp == 0 else x

    run = StandInRun(whole.outputs, whole.down, part, whole.attended)
    run.hands_pairs = whole.hands_pairs
    actual = _attempt(run, module, call)
    if actual is None or run.inputs.keys() != whole.inputs.keys():
        return False
    pairs = [(actual, expected)]
    for name, x in whole.inputs.items():
        pairs.append((run.inputs[name], part(x, -1) if name == whole.down else x))
    pairs += [(x, part(y, 1)) for x, y in zip(run.operands, whole.operands, strict=True)]
    # Not equal to the bit: the last channels of a vector are computed in another way.
    return all(x.shape == y.shape and torch.allclose(x, y, rtol=1e-5) for x, y in pairs)
