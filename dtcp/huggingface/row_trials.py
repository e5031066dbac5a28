"""Trials of heads that read whole rows: what they read of a row, and what of it reaches what.

They run while a survey does. A head is called again with other hidden states of its tokens, made
up: what is around it stands still.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dtcp.huggingface.mixing_probe import probe_ids, tensors

MASK = "attention_mask"


def takes_mask(model: nn.Module) -> bool:
    """Whether a model's own forward may be given_mask of padding."""
    parameters = inspect.signature(type(model).forward).parameters
    return MASK in parameters or any(x.kind is x.VAR_KEYWORD for x in parameters.values())


def with_numbers(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Outputs of transformers with their floating-point tensors changed."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(with_numbers(x, change) for x in value)
    if isinstance(value, Mapping):
        return type(value)(**{key: with_numbers(x, change) for key, x in value.items()})
    return value


def hidden_of(out: Any) -> Tensor:
    """The last hidden states among what a trunk gives: the first of it."""
    hidden: Tensor = out if isinstance(out, Tensor) else out[0]
    return hidden


def with_hidden(out: Any, hidden: Tensor) -> Any:
    """What a trunk gives, with other last hidden states."""
    before = hidden_of(out)
    return with_numbers(out, lambda x: hidden if x is before else x)


def outputs_by_name(out: Any, seq_len: int) -> tuple[tuple[str, ...], bool]:
    """The names of a model's outputs that are of rows, and whether there are none of tokens."""
    numbers = {key: x for key, x in out.items() if isinstance(x, Tensor) and x.is_floating_point()}
    of_rows = tuple(key for key, x in numbers.items() if seq_len not in x.shape)
    return of_rows, len(of_rows) == len(_numbers(out))


def rows_stand_still(model: Any, run: Callable[..., object], seq_len: int) -> bool:
    """Whether a model's outputs of rows are the same for other tokens."""
    ids = probe_ids(model, seq_len)
    outputs = [_numbers(run(each)) for each in (ids, ids.roll(1, 1))]
    return _alike(*([x for x in each if seq_len not in x.shape] for each in outputs))


class ModuleTrial:
    """A module that may pool what it is given, seen in one run of its model.

    Args:
        run: one forward of the model, given input_ids.
    """

    def __init__(self, model: Any, name: str, run: Callable[..., object], seq_len: int) -> None:
        self.name, self.module = name, model.get_submodule(name)
        self.run, self.seq_len, self.ids = run, seq_len, probe_ids(model, seq_len)
        self.calls: list[tuple[Any, Any, Any]] = []
        hook = self.module.register_forward_hook(
            lambda _, args, kwargs, out: self.calls.append((args, kwargs, out)), with_kwargs=True
        )
        self.model_out = run(self.ids)
        hook.remove()

    def of_rows(self) -> tuple[tuple[str, ...], bool]:
        """The names of outputs that are of rows, and whether there are none of tokens."""
        return outputs_by_name(self.model_out, self.seq_len)

    def pools(self) -> bool:
        """Whether it makes a row of its tokens' hidden states alone, and no token sees that."""
        if len(self.calls) != 1 or not isinstance(self.model_out, Mapping):
            return False
        # In a tuple, no name tells those of rows from those of tokens.
        of_rows = [x for x in _numbers(self.model_out) if self.seq_len not in x.shape]
        if len(of_rows) > len(self.of_rows()[0]):
            return False
        args, kwargs, out = self.calls[0]
        given, gave = tensors((args, kwargs)), _numbers(out)
        if len(given) != 1 or given[0].shape[:-1] != self.ids.shape or not gave:
            return False
        if not given[0].is_floating_point() or self._of_tokens(gave):
            return False
        with _forward(self.module, lambda *_, **__: with_numbers(out, _noisy)):
            outputs = self.run(self.ids)
        before, now = (self._of_tokens(_numbers(x)) for x in (self.model_out, outputs))
        return _alike(before, now)

    def reads_padding(self) -> bool:
        """Whether it makes something else of a row with more behind it."""
        length = self.seq_len // 2
        short = self._again(lambda x: x[:, :length])
        return not _alike(short, self._again(lambda x: _noisy_from(x, torch.tensor([length]))))

    def constant(self) -> Any:
        """Inside, it gives what it gave."""
        out = self.calls[0][2]
        return _forward(self.module, lambda *_, **__: out)

    def _again(self, change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        args, kwargs, _ = self.calls[0]
        kwargs = {key: with_numbers(x, change) for key, x in kwargs.items()}
        return _numbers(self.module.forward(*with_numbers(args, change), **kwargs))

    def _of_tokens(self, outputs: list[Tensor]) -> list[Tensor]:
        return [x for x in outputs if self.seq_len in x.shape]


class TrunkTrial:
    """What a model's own forward does with what its trunk gives, of rows of several lengths."""

    def __init__(self, model: Any, trunk: str, run: Callable[..., object], seq_len: int) -> None:
        self.model, self.trunk, self.run = model, model.get_submodule(trunk), run
        self.seq_len = seq_len
        row = probe_ids(model, seq_len)
        self.ids = torch.cat([row, row.roll(1, 1), row.roll(2, 1)])
        self.lengths = torch.tensor([seq_len // 2 + 1, seq_len // 2, 3], device=row.device)
        outputs: list[Any] = []
        hook = self.trunk.register_forward_hook(lambda _, __, out: outputs.append(out))
        self.model_out: Any = run(self.ids)
        hook.remove()
        self.out = outputs[0] if len(outputs) == 1 else None
        self.hands_on = True

    def of_rows(self) -> tuple[tuple[str, ...], bool]:
        """The names of outputs that are of rows, and whether there are none of tokens."""
        return outputs_by_name(self.model_out, self.seq_len)

    def pools(self) -> bool:
        """Whether it makes rows of the last hidden states, and calls the trunk as it was called."""
        if self.out is None or hidden_of(self.out).shape[:-1] != self.ids.shape:
            return False
        if not isinstance(self.model_out, Mapping) or not self.of_rows()[1]:
            return False
        hidden, ones = hidden_of(self.out), torch.ones_like(self.ids)
        outputs = self._outputs(hidden, ones)
        others = with_numbers(self.out, lambda x: x * torch.nan if self.seq_len in x.shape else x)
        same = (self._outputs(hidden, None), self._outputs(hidden, ones, others))
        return self.hands_on and all(_alike(outputs, each) for each in same)

    def reads_padding(self) -> bool:
        """Whether it makes something else of a row with padding behind it, which a mask tells."""
        longest, hidden = int(self.lengths.max()), hidden_of(self.out)
        mask = (torch.arange(self.seq_len, device=self.ids.device) < self.lengths[:, None]).long()
        short = self._outputs(hidden, mask, length=longest)
        return not _alike(short, self._outputs(_noisy_from(hidden, self.lengths), mask))

    def _outputs(
        self, hidden: Tensor, mask: Tensor | None, others: Any = None, length: int | None = None
    ) -> list[Tensor]:
        """What the model gives where its trunk gives this."""
        given_mask = {} if mask is None or not takes_mask(self.model) else {MASK: mask[:, :length]}
        out = with_hidden(self.out if others is None else others, hidden[:, :length])
        own: list[Tensor] = []

        def stub(*args: Any, **kwargs: Any) -> Any:
            known = {id(x) for x in own}
            self.hands_on &= all(id(x) in known for x in tensors((args, kwargs)))
            return out

        hook = self.model.register_forward_pre_hook(
            lambda _, args, kwargs: own.extend(tensors((args, kwargs))), with_kwargs=True
        )
        try:
            with _forward(self.trunk, stub):
                return _numbers(self.run(self.ids[:, :length], **given_mask))
        finally:
            hook.remove()


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, a module runs this."""
    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if before is not None:
            vars(module)["forward"] = before


def _numbers(out: object) -> list[Tensor]:
    return [x for x in tensors(out) if x.is_floating_point()]


def _noisy(x: Tensor) -> Tensor:
    return x + (x.std(correction=0) + 1e-3) * torch.randn_like(x)


def _noisy_from(x: Tensor, lengths: Tensor) -> Tensor:
    """Hidden states of rows [B, S, C] with others behind their first tokens, so many each."""
    behind = torch.arange(x.shape[1], device=x.device) >= lengths.to(x.device)[:, None]
    return _noisy(x).where(behind[..., None], x)


def _alike(before: list[Tensor], now: list[Tensor]) -> bool:
    pairs = zip(before, now, strict=True)
    return all(a.shape == b.shape and a.allclose(b, rtol=1e-5, atol=1e-6) for a, b in pairs)
