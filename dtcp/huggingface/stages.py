"""Cuts a model of transformers into pipeline stages: each is the model itself without some modules.

A stage keeps some of the layers, under their numbers in the whole model. In the place of what
other stages have are stand-ins that hand on what they are given: the model's own forward runs.

    stage 0    embedding   layers 0 1 . .    .     .      hands on what leaves the last layer
    stage 1        .         .  . 2 3   norm  head     is called with that, where the first begins

What a forward does besides, before its layers, between or behind them, is done in each stage, and
the stream that travels does not go through it. Where that gives something else than the whole
model, a trial finds it (stage_trial.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dtcp.forward import wrap_forward

_STAGE = "dtcp_stage"


class UncutError(ValueError):
    """A model that is not cut into stages; `why` is a clause that names what it has."""

    def __init__(self, why: str, model: object = None) -> None:
        self.why = why
        super().__init__(
            f"A model of transformers is cut between layers that hand on hidden states alone, got "
            f"a {type(model).__name__}, but {why}: train it without an axis pp."
        )


@dataclass(frozen=True)
class StageCut:
    """Where a model is cut into pipeline stages; `stage_cut` proves one.

    Args:
        layers: the name of its list of layers.
        count: how many these are.
        outputs: how many values a layer returns in a tuple; 0 for a tensor alone.
        first, last: modules with weights that run before the layers, and behind them.
    """

    layers: str
    count: int
    outputs: int
    first: tuple[str, ...]
    last: tuple[str, ...]

    def stage(self, numbers: range) -> "HFStage":
        """The stage with the layers of these numbers; the first one of all is in the first stage.

        Raises:
            ValueError: numbers that the model lacks, or none.
        """
        if numbers.step != 1 or not 0 <= numbers.start < numbers.stop <= self.count:
            raise ValueError(
                f"A stage has some of the layers 0 to {self.count - 1} of {self.layers}, one after "
                f"the other, got numbers={numbers}: give range(first, last + 1)."
            )
        return HFStage(self, numbers, numbers.start == 0, numbers.stop == self.count)


@dataclass(frozen=True)
class HFStage:
    """A pipeline stage of a model of transformers, for `parallelize_hf`.

    Args:
        cut: of its model.
        numbers: of its own layers, in the whole model.
        is_first, is_last: whether it embeds tokens, and whether it scores them.
    """

    cut: StageCut
    numbers: range
    is_first: bool
    is_last: bool


class StandIn(nn.Module):
    """In the place of what another stage has; no parameters."""


class EndStandIn(StandIn):
    """In the place of a module at an end: hands on hidden states, and gives 0 for ids."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            # Some models look its dtype up. Not a parameter: there is nothing to train or save.
            vars(self)["weight"] = weight.detach().new_empty(0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        hidden = (x for x in given if x.ndim == 3 and x.is_floating_point())
        return next(hidden, torch.zeros((), device=given[0].device))


class LayerStandIn(StandIn):
    """In the place of a layer: hands on hidden states; of its kind, where the layer says one."""

    def __init__(self, layer: nn.Module, outputs: int) -> None:
        super().__init__()
        said = {key: x for key, x in vars(layer).items() if isinstance(x, str | int)}
        vars(self).update({key: x for key, x in said.items() if key not in vars(self)})
        self.outputs = outputs

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states, *(None,) * (self.outputs - 1)) if self.outputs else hidden_states


@dataclass(frozen=True)
class Elsewhere:
    """What a stage lacks of its model.

    Args:
        weights: names of what other stages hold.
        copies: names of its own that other stages train.
        tied: of each weight that both ends hold, its name in the last stage and in the first one.
    """

    weights: frozenset[str] = frozenset()
    copies: frozenset[str] = frozenset()
    tied: tuple[tuple[str, str], ...] = ()


def weights_elsewhere(model: nn.Module) -> Elsewhere:
    """What a stage lacks; nothing, of a whole model."""
    elsewhere: Elsewhere = vars(model).get(_ELSEWHERE, Elsewhere())
    return elsewhere


_ELSEWHERE = "dtcp_weights_elsewhere"


def keep_stage(model: Any, stage: HFStage) -> None:
    """Leave a stage's modules in a model that has its mixers.

    It is called with token ids, or behind the first stage with what the one before gave, then by
    the keywords of the model, and gives a tensor: the stream, or of the last stage the logits.
    """
    cut, whole = stage.cut, set(model.state_dict())
    layers = model.get_submodule(cut.layers)
    tied = _tied_ends(model, cut)
    for number, layer in list(layers.named_children()):
        if int(number) not in stage.numbers:
            setattr(layers, number, LayerStandIn(layer, cut.outputs))
    for name in (*(() if stage.is_first else cut.first), *(() if stage.is_last else cut.last)):
        parent, _, child = name.rpartition(".")
        module = model.get_submodule(parent)
        setattr(module, child, EndStandIn(getattr(module, child)))
    own = set(model.state_dict())
    copies = () if stage.is_first else (name for name, _ in tied if name in own)
    vars(model)[_ELSEWHERE] = Elsewhere(frozenset(whole - own), frozenset(copies), tied)
    vars(model)[_STAGE] = stage
    wrap_forward(model, _run_stage)


def _tied_ends(model: nn.Module, cut: StageCut) -> tuple[tuple[str, str], ...]:
    """Weights of the last stage that are the first one's, by their names in either."""
    named = list(model.named_parameters(remove_duplicate=False))
    first, last = (tuple(f"{module}." for module in end) for end in (cut.first, cut.last))
    of_first = {x: name for name, x in named if name.startswith(first)}
    return tuple(
        (name, of_first[x]) for name, x in named if x in of_first and name.startswith(last)
    )


def _run_stage(model: Any, forward: Callable[..., Any], stream: Tensor, **inputs: Any) -> Any:
    stage: HFStage = vars(model)[_STAGE]
    layers = list(model.get_submodule(stage.cut.layers).children())
    left: list[Tensor] = []

    def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((stream, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": stream})

    def leave(_: Any, __: Any, out: Any) -> None:
        left.append(out[0] if stage.cut.outputs else out)

    hooks = []
    if not stage.is_first:
        hooks.append(layers[0].register_forward_pre_hook(enter, with_kwargs=True))
    if not stage.is_last:
        hooks.append(layers[-1].register_forward_hook(leave))
    try:
        out = forward(**{"input_ids" if stage.is_first else "inputs_embeds": stream}, **inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return out.logits if stage.is_last else left[0]


def find_cut(model: Any, run: Callable[[], object]) -> StageCut:
    """Where a model might be cut, seen in one run of it.

    Raises:
        UncutError: layers that do not follow one another, or weights that no stage has to itself.
    """
    name = _name_of_layers(model)
    layers = list(model.get_submodule(name).children())
    inside = {module for layer in layers for module in layer.modules()}
    outside = {
        other: module
        for other, module in model.named_modules()
        if module not in inside and any(True for _ in module.parameters(recurse=False))
    }
    around = [other for other in outside if f"{name}.".startswith(f"{other}." if other else "")]
    if around:
        raise UncutError(f"its {around[0] or 'own module'} has weights around {name}")
    # Of one inside of another, the outer one is cut out.
    outside = {
        other: module
        for other, module in outside.items()
        if not any(other.startswith(f"{outer}.") for outer in outside)
    }
    entered, gave, when = _noted_run(layers, outside, run)
    kinds = {len(out) if isinstance(out, tuple) else 0 for out in gave}
    hidden = [out[0] if isinstance(out, tuple) else out for out in gave]
    if entered != list(range(len(layers))) or not all(isinstance(x, Tensor) for x in hidden):
        raise UncutError(f"its {name} do not run one after the other, each once")
    if len(kinds) > 1:
        raise UncutError(f"its {name} return tuples of {sorted(kinds)} values")
    ends = {0: [], 2 * len(layers): []}  # type: dict[int, list[str]]
    for other, times in when.items():
        if len(times) != 1 or not times <= ends.keys():
            raise UncutError(
                f"its {other} has weights that run neither before its {name} alone nor behind "
                f"them alone"
            )
        ends[times.pop()].append(other)
    return StageCut(name, len(layers), kinds.pop(), *map(tuple, ends.values()))


def _noted_run(
    layers: list[nn.Module], outside: Mapping[str, nn.Module], run: Callable[[], object]
) -> tuple[list[int], list[Any], dict[str, set[int]]]:
    """Run a model: the layers in their order, what they gave, and when the other modules ran.

    That is counted in layers that were entered and left before.
    """
    entered: list[int] = []
    gave: list[Any] = []
    when: dict[str, set[int]] = {name: set() for name in outside}

    def enters(number: int) -> Callable[..., None]:
        return lambda *_: entered.append(number)

    def runs(name: str) -> Callable[..., None]:
        return lambda *_: when[name].add(len(entered) + len(gave))

    hooks = [x.register_forward_pre_hook(enters(i)) for i, x in enumerate(layers)]
    hooks += [x.register_forward_hook(lambda _, __, out: gave.append(out)) for x in layers]
    hooks += [x.register_forward_pre_hook(runs(name)) for name, x in outside.items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return entered, gave, when


def _name_of_layers(model: Any) -> str:
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [
        name
        for name, x in model.named_modules()
        if isinstance(x, nn.ModuleList) and len(x) == count
        if not any(part.isdigit() for part in name.split("."))
    ]
    if len(lists) != 1:
        raise UncutError(f"its layers are not in one list of {count}, but in {lists}")
    return lists[0]
