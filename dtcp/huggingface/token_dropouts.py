"""Makes dropouts of transformers' models and of peft's adapters drop by token.

They are called with activations only, so the model's forward, and each block's, records the batch
that it runs on. A checkpointed block runs again with the metadata that it was called with.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dtcp.forward import wrap_forward
from dtcp.huggingface.functional_dropouts import install_rates, noting_rates, rates_of
from dtcp.token_dropout import SCOPE, DropoutScope, ForwardOnBatch, TokenDropout, numbered

_OF_ADAPTER = re.compile(r"(.*)\.lora_dropout\.[^.]+$")


@dataclass(frozen=True)
class SurveyedDropout:
    """A module that drops channels of each token.

    Args:
        name: of the module in its model.
        of_memory: whether its tokens are those of an encoder's row.
        width: channels that a token has there on one device; None: not known.
        called_again: whether one forward calls it several times.
        functional: whether it is a number that its module drops by, and no module.
    """

    name: str
    of_memory: bool = False
    width: int | None = None
    called_again: bool = False
    functional: bool = False


def drops(module: nn.Module) -> bool:
    """Whether a module drops, and in a way that can be done by token."""
    return type(module) is nn.Dropout and not module.inplace and module.p > 0


class DropoutCalls:
    """Records what dropouts are called with while a survey runs in training mode; none drops.

    Their rates stay, for attention modules read them as numbers.

    Args:
        memory_len: tokens of the encoder's row; 0 without one.
    """

    def __init__(self, model: nn.Module, memory_len: int) -> None:
        self.model, self.memory_len = model, memory_len
        self.modules = {x: name for name, x in model.named_modules() if drops(x)}
        self.rates = rates_of(model)
        self.found: dict[str, SurveyedDropout | None] = {}
        owners = {module for module, _ in self.rates.values()}
        found = _called_with_metadata(model, lambda x: drops(x) or x in owners)
        self.blocks = {x: name for name, x in found}
        self.run_again: dict[str, None] = {}
        self._run: set[nn.Module] = set()
        self._called: set[str] = set()
        self._rows = torch.Size((0, 0))

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Inside, calls are noted."""
        for module in self.modules:
            vars(module)["forward"] = partial(self._note, module)
        hooks = [self.model.register_forward_pre_hook(self._start, with_kwargs=True)]
        hooks += [module.register_forward_pre_hook(self._enter) for module in self.blocks]
        try:
            with noting_rates(self.model, self._note_call):
                yield
        finally:
            for hook in hooks:
                hook.remove()
            for module in self.modules:
                del vars(module)["forward"]

    def _start(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        own = kwargs.get("decoder_input_ids", kwargs.get("input_ids"))
        self._rows = self._rows if own is None else own.shape
        self._run.clear()
        self._called.clear()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module in self._run and module.training:
            self.run_again[self.blocks[module]] = None
        self._run.add(module)

    def _note(self, module: nn.Module, x: Tensor) -> Tensor:
        if module.training:
            # Else a part of the model is run by itself, on whatever shows mixing.
            self._note_call(self.modules[module], x)
        return x

    def _note_call(self, name: str, x: Tensor) -> None:
        now, before = self._as_token_dropout(name, x), self.found.get(name)
        if before is not None and now is not None:
            again = name in self._called or before.called_again
            now = replace(now, called_again=again) if _alike(before, now) else None
        elif name in self.found:
            now = None
        self.found[name] = now
        self._called.add(name)

    def _as_token_dropout(self, name: str, x: Tensor) -> SurveyedDropout | None:
        for seq_len in (self._rows[1], self.memory_len):
            rows = torch.Size((self._rows[0], seq_len))
            if x.shape[:2] == rows or (x.ndim == 2 and len(x) == rows.numel()):
                width = x.shape[2:].numel() if x.shape[:2] == rows else x.shape[1]
                of_memory, functional = seq_len != self._rows[1], name in self.rates
                return SurveyedDropout(name, of_memory, width, functional=functional)
        return None

    def surveyed(self) -> tuple[SurveyedDropout, ...]:
        """Those that drop channels of tokens, with those beside them that other adapters use."""
        known = {name: x for name, x in self.found.items() if x is not None}
        for name in [x for x in self.modules.values() if x not in self.found]:
            layer = _OF_ADAPTER.match(name)
            beside = [x for other, x in known.items() if _is_beside(other, name)]
            if layer and beside:
                known[name] = replace(beside[0], name=name)
        return tuple(known.values())

    def refused(self) -> Iterator[str]:
        """Why some dropouts cannot be done by token, in sentences."""
        known = {each.name: each for each in self.surveyed()}
        places = Counter(x for _, x in self.model.named_modules(remove_duplicate=False))
        dropping = [(x, name, x.p) for x, name in self.modules.items()]
        called = {name: x for name, x in self.rates.items() if name in self.found}
        dropping += [(x, name, vars(x)[key]) for name, (x, key) in called.items()]
        for module, name, rate in dropping:
            said = f"{name} ({type(module).__name__}): dropout={rate} in training would "
            if name not in known:
                yield f"{said}depend on the mesh: set it to 0.0 in the config."
            again = [each for each in self.run_again if name.startswith(f"{each}.")]
            if again:
                yield f"{said}drop the same each time that {again[0]} runs: set it to 0.0."
            elif places[module] > 1 and name in known and known[name].called_again:
                # A block counts the calls in itself alone.
                yield f"{said}drop the same in each of {places[module]} places: use one for each."


def _alike(before: SurveyedDropout, now: SurveyedDropout) -> bool:
    return replace(before, called_again=False) == now


def _is_beside(other: str, name: str) -> bool:
    return other.rpartition(".")[0] == name.rpartition(".")[0]


def dropouts_of_adapters(model: nn.Module) -> tuple[SurveyedDropout, ...]:
    """Dropouts of adapters of a model on the meta device, which a survey of its copy misses."""
    names = [name for name, module in model.named_modules() if drops(module)]
    layers = {x: model.get_submodule(m[1]) for x in names if (m := _OF_ADAPTER.match(x))}
    return tuple(
        SurveyedDropout(name, width=getattr(layer, "in_features", None))
        for name, layer in layers.items()
    )


def install_token_dropouts(model: nn.Module, surveyed: tuple[SurveyedDropout, ...]) -> None:
    """Replace the dropouts that a survey found by modules that drop by token."""
    install_rates(model, (each.name for each in surveyed if each.functional))
    made = {model.get_submodule(each.name): _token_dropout(model, each) for each in surveyed}
    if not made:
        return
    scope = DropoutScope()
    for name, module in [*model.named_modules(remove_duplicate=False)]:
        if module in made:
            made[module].scope = scope
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, made[module])
    numbered(model)
    for _, module in [*_called_with_metadata(model, lambda x: isinstance(x, TokenDropout))]:
        vars(module)[SCOPE] = scope
        is_block = not (module is model or _is_model(module))
        wrap_forward(module, _checkpointed_on_batch if is_block else _on_batch)


def _is_model(module: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def _token_dropout(model: nn.Module, surveyed: SurveyedDropout) -> TokenDropout:
    before: Any = model.get_submodule(surveyed.name)
    made = TokenDropout(before.p).train(before.training)
    made.of_memory, made.width = surveyed.of_memory, surveyed.width
    made.called_again = surveyed.called_again
    return made


def _called_with_metadata(
    model: nn.Module, is_dropout: Callable[[nn.Module], bool]
) -> Iterator[tuple[str, nn.Module]]:
    """A model, the models inside of it and their blocks, where any of them drops."""
    blocks: list[str] = []
    for name, module in model.named_modules():
        if not any(map(is_dropout, module.modules())):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        in_block = any(name.startswith(f"{each}.") for each in blocks)
        is_block = bool(name) and isinstance(parent, nn.ModuleList) and not in_block
        if is_block:
            blocks.append(name)
        if is_block or module is model or _is_model(module):
            yield name, module


def _on_batch(module: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    scope: DropoutScope = getattr(module, SCOPE)
    with scope.noting(*args, *kwargs.values()):
        return forward(*args, **kwargs)


def _checkpointed_on_batch(
    block: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """A block's forward, which transformers may checkpoint inside: in a graph, the graph does."""
    own = vars(block).get("_gradient_checkpointing_func")
    if own is not None and not (torch.compiler.is_compiling() or isinstance(own, _Checkpoint)):
        block._gradient_checkpointing_func = _Checkpoint(vars(block)[SCOPE], own)
    return forward(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class _Checkpoint:
    """A checkpoint of transformers, whose function runs again on the batch that it ran on."""

    scope: DropoutScope
    checkpoint: Callable[..., Any]

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        batch = self.scope.batch

        def again(*args: Any, **kwargs: Any) -> Any:
            with self.scope.noting(batch):
                return function(*args, **kwargs)

        return self.checkpoint(again, *args, **kwargs)


def note_batches(model: nn.Module, blocks: Collection[nn.Module]) -> None:
    """Make blocks with dropouts record their batch, except these, which do already."""
    for module in model.modules():
        if SCOPE in vars(module) and module not in blocks and not _is_model(module):
            module.forward = ForwardOnBatch(vars(module)[SCOPE], module.forward)


def split_over_tp(model: nn.Module, tp: DeviceMesh) -> None:
    """Tell dropouts their rank of tp, and with it their channels.

    Raises:
        ValueError: one whose channels on one device are not known.
    """
    for name, module in model.named_modules():
        if isinstance(module, TokenDropout):
            if module.width is None:
                raise ValueError(
                    f"Under tp a dropout knows how many channels its tokens have on one device, "
                    f"got p={module.p} of {name} in a model on the meta device: set it to 0.0 in "
                    f"the config, or build the model on a real device."
                )
            module.tp_rank, module.tp_size = tp.get_local_rank(), tp.size()
