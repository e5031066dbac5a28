"""Feed-forwards that transformers' plan says nothing of: found by their shapes, and tried.

Layers that widen are split by their outputs and the one that narrows by its inputs, if the parts of
the module then add up to the whole: so they do wherever what stands between is elementwise.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

COLWISE, ROWWISE, WHOLE = "colwise", "rowwise", "whole"
HIDDEN = 8
"""Width of what is tried."""


def inferred_roles(
    modules: Mapping[str, nn.Module], units: Mapping[str, Sequence[str]], tp: int
) -> dict[str, str]:
    """Roles in transformers' terms, by module name.

    Args:
        units: parts of blocks -> the modules in them that have parameters.
    """
    roles: dict[str, str] = {}
    tried: dict[tuple[object, ...], bool] = {}
    for unit, names in units.items():
        linears = {name: modules[name] for name in names}
        pair = up_and_down(linears, tp)
        if unit not in modules or unit in names or pair is None:
            continue
        ups, down = pair
        shapes = [tuple(p.shape) for p in modules[unit].parameters()]
        kind = (*map(type, modules[unit].modules()), *shapes)
        if kind not in tried:
            prefix = len(unit) + 1
            tried[kind] = _adds_up(modules[unit], [n[prefix:] for n in ups], down[prefix:], tp)
        if tried[kind]:
            roles |= {**dict.fromkeys(ups, COLWISE), down: ROWWISE}
    return roles


def up_and_down(linears: Mapping[str, nn.Module], tp: int) -> tuple[list[str], str] | None:
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


def _adds_up(module: nn.Module, ups: Sequence[str], down: str, tp: int) -> bool:
    """Whether what the ranks of tp would compute adds up, tried on a narrow copy on the host."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        whole = _narrow(module, ups, down, HIDDEN * tp)
        x = torch.randn(1, 3, HIDDEN)
        try:
            expected = whole.forward(x)
            parts = [_part(whole, ups, down, rank, tp).forward(x) for rank in range(tp)]
        # Code of others, called as nobody promised that it could be: any class may come, and each
        # gives the same answer, that this is no plain feed-forward. It then stays whole on each
        # rank of tp, which is exact, and a warning says so; an error of its own shows when it runs.
        except Exception:  # noqa: BLE001
            return False
        if not isinstance(expected, Tensor):
            return False
        return torch.allclose(sum(parts, torch.zeros(())), expected, rtol=1e-4, atol=1e-5)


def _narrow(module: nn.Module, ups: Sequence[str], down: str, width: int) -> Any:
    """A copy of a module whose layers have other widths and weights; the others are not copied."""
    memo: dict[int, Any] = {id(p): p for p in module.parameters()}
    narrow = deepcopy(module, memo).eval()
    for name in (*ups, down):
        layer: Any = narrow.get_submodule(name)
        shape = (HIDDEN, width) if name == down else (width, HIDDEN)
        layer.out_features, layer.in_features = shape
        layer.weight = nn.Parameter(torch.randn(shape))
        layer.bias = None if layer.bias is None else nn.Parameter(torch.randn(shape[0]))
    return narrow


def _part(whole: nn.Module, ups: Sequence[str], down: str, rank: int, tp: int) -> Any:
    part = deepcopy(whole)
    for name in (*ups, down):
        layer: Any = part.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight.chunk(tp, 1 if name == down else 0)[rank])
        if layer.bias is not None and name != down:
            layer.bias = nn.Parameter(layer.bias.chunk(tp)[rank])
        elif layer.bias is not None and rank:
            layer.bias.zero_()
    return part
