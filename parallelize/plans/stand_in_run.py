"""Run the forward of a module while its layers give random numbers: what reaches what?

No weight is read, so a module on the meta device will do. Of each layer that has none of its own
numbers, the first argument comes back; attention gives random numbers by heads.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from dtcp.huggingface.attend_by_name import ATTEND
from dtcp.huggingface.mixing_probe import tensors
from dtcp.huggingface.own_attention import written_again
from dtcp.parallelize.tensor_parallel import ChangedConfig, of_config

REGISTRY = "ALL_ATTENTION_FUNCTIONS"
"""Where the forward of an attention module of transformers finds what attends."""


class StandInRun:
    """One run of a module with stand-ins, as one rank would run it, and what they were handed.

    Args:
        outputs: whole outputs of layers, [tokens, channels], by their names in the module; there
            are enough of them for any input.
        attended: what attention gives, [1, L, H, V]; None to make it up.
        own: what the module is said to have under some names, in the place of what it has; those
            of its config with "config." before them.
        pairs: whether modules around attention return its weights, too.
    """

    def __init__(
        self,
        outputs: Mapping[str, Tensor],
        attended: Tensor | None,
        own: Mapping[str, Any],
        *,
        pairs: bool,
    ) -> None:
        self.outputs = outputs
        self.attended, self.own, self.pairs = attended, own, pairs
        self.inputs: dict[str, Tensor] = {}
        self.marks: dict[str, Tensor] = {}
        self.operands: tuple[Tensor, ...] = ()
        self.reads: dict[str, Tensor] = {}
        self.reads_two = False
        self.running: list[str] = []
        self.within: dict[str, tuple[str, ...]] = {}
        self.others: list[Tensor] = []
        self.arguments: dict[str, Any] = {}

    def run(self, module: nn.Module, **kwargs: Any) -> Tensor:
        """The first output of the module; the others are kept."""
        out = _StandIn(module, "", self)(**kwargs)
        first: Tensor = out[0] if isinstance(out, tuple) else out
        self.others = [x for x in tensors(out) if x is not first]
        return first

    def give(self, name: str, x: Tensor) -> Tensor:
        """The output of a layer for x, and in which modules it runs."""
        self.reads_two |= self.reads.setdefault(name, x) is not x
        self.within[name] = tuple(self.running)
        return self.outputs[name][: x.shape[:-1].numel()].view(*x.shape[:-1], -1)

    def hand_back(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Its first argument, of a layer that is none of these."""
        first = args[0] if args else next(iter(kwargs.values()))
        self.inputs[name] = first
        # Another tensor: what reads it does not read the argument. It says whose output it was.
        if name not in self.marks:
            self.marks[name] = torch.zeros((), requires_grad=torch.is_grad_enabled())
        return first + self.marks[name]

    def get_interface(self, *_: Any) -> Callable[..., Any]:
        """In the place of the registry's."""
        return self._attend

    def __getitem__(self, _: Any) -> Callable[..., Any]:
        return self._attend

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        """[B, L, H * V], in the place of what forwards that are written again call."""
        out: Tensor = self._attend(*args, **kwargs)[0]
        return out.flatten(2)

    def _attend(self, _: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.reads_two |= bool(self.operands)
        self.operands = (q, k, v)
        self.arguments = {**{f"{place}": x for place, x in enumerate(args)}, **kwargs}
        if self.attended is None:
            shape = 1, q.shape[2], q.shape[1], v.shape[3]
            self.attended = torch.randn(shape, requires_grad=torch.is_grad_enabled())
        return self.attended, None


class _StandIn:
    """What a forward takes for its module."""

    def __init__(self, module: nn.Module, prefix: str, run: StandInRun) -> None:
        self._module, self._prefix, self._run = module, prefix, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = forward_of(self._module)
        names = {**own.__globals__, REGISTRY: self._run, ATTEND: self._run.attend}
        forward = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
        forward.__kwdefaults__ = own.__kwdefaults__
        self._run.running.append(self._prefix.rstrip("."))
        out = forward(self, *args, **kwargs)
        self._run.running.pop()
        return out

    def __getattr__(self, name: str) -> Any:
        if name == "training":
            return False
        if self._prefix + name in self._run.own:
            return self._run.own[self._prefix + name]
        value = getattr(self._module, name)
        if name == "config":
            return ChangedConfig(value, of_config(self._run.own))
        if isinstance(value, nn.Dropout):
            return nn.Identity()
        if isinstance(value, MethodType) and value.__self__ is self._module:
            return partial(value.__func__, self)
        return self._of(value, self._prefix + name) if isinstance(value, nn.Module) else value

    def __iter__(self) -> Iterator[Any]:
        return (getattr(self, name) for name, _ in self._module.named_children())

    def _of(self, found: nn.Module, name: str) -> Any:
        if name in self._run.outputs:
            return _Layer(found, partial(self._run.give, name))
        if any(each.startswith(f"{name}.") for each in self._run.outputs):
            return _StandIn(found, f"{name}.", self._run)
        if next(found.parameters(), None) is None:
            return found
        return lambda *args, **kwargs: self._hand_back(found, name, args, kwargs)

    def _hand_back(self, found: nn.Module, name: str, args: Any, kwargs: Any) -> Any:
        first = self._run.hand_back(name, args, kwargs)
        pairs = self._run.pairs and any(map(calls_registry, found.modules()))
        return (first, None) if pairs else first


class _Layer:
    """A layer that gives random numbers; what else is read of it is its own."""

    def __init__(self, module: nn.Module, give: Callable[..., Tensor]) -> None:
        self._module, self._give = module, give

    def __call__(self, x: Tensor) -> Tensor:
        return self._give(x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def forward_of(module: nn.Module) -> Any:
    """The forward of a module's class, or the one that is written again for it."""
    again = written_again(module)
    return inspect.unwrap(type(module).forward) if again is None else again


def form_of(module: nn.Module) -> tuple[object, ...]:
    """What is the same of modules that run alike: their classes and their parameters' shapes."""
    return (*map(type, module.modules()), *(tuple(p.shape) for p in module.parameters()))


def calls_registry(module: nn.Module) -> bool:
    """Whether a module's forward takes attention from the registry of transformers, or will."""
    code = getattr(forward_of(module), "__code__", None)
    return code is not None and (REGISTRY in code.co_names or ATTEND in code.co_names)
