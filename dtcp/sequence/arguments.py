"""Checks of arguments: whole numbers, dims that a tensor has, tensors of tokens.

Each refuses in one sentence what Python or torch would fail on further down, without naming the
argument, or would silently take for something else: True for 1, rank -1 for the last rank, a float
for an index.
"""

import math
from collections.abc import Collection, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

WHOLE_NUMBERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
"""What token ids, document ids and position ids come in."""
BOOL = (torch.bool,)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_whole(value: object) -> bool:
    """Whether a value is an int, Python's or numpy's; a bool is not."""
    return _is_whole(type(value))


def are_whole(values: Collection[object]) -> bool:
    """Whether all values are whole. Looks at each type once: there may be a value per document."""
    return all(map(_is_whole, set(map(type, values))))


def _is_whole(kind: type) -> bool:
    return kind is int or (issubclass(kind, Integral) and not issubclass(kind, bool))


def check_ints(subject: str, *, least: int | None = None, **values: Any) -> None:
    """Refuse anything but an int, or one below `least`.

    Args:
        subject: what reads the values; the error begins with it.
    Raises:
        TypeError, ValueError: as above.
    """
    for name, value in values.items():
        if not is_whole(value):
            raise TypeError(
                f"{subject} takes whole numbers, got {name}={value!r} of type "
                f"{type(value).__name__}: give an int."
            )
        if least is not None and value < least:
            raise ValueError(
                f"{subject} takes {name} >= {least}, got {name}={value}: give {least} or more."
            )


def check_kind(
    subject: str, kinds: type | tuple[type, ...], /, remedy: str = "give one", **values: Any
) -> None:
    """Refuse a value of another class: a class where an instance is read, True for a choice.

    Args:
        remedy: what to do instead.
    Raises:
        TypeError: as above.
    """
    for name, value in values.items():
        if not isinstance(value, kinds):
            several = kinds if isinstance(kinds, tuple) else (kinds,)
            names = " or ".join("None" if k is type(None) else k.__name__ for k in several)
            raise TypeError(f"{subject} takes {name} of {names}, got {name}={value!r}: {remedy}.")


def check_rank(subject: str, rank: int, num_shards: int) -> None:
    """Refuse anything but a rank of an axis of `num_shards` ranks."""
    check_ints(subject, rank=rank)
    if not 0 <= rank < num_shards:
        raise ValueError(
            f"{subject} counts ranks from 0 to num_shards - 1, got rank={rank}, "
            f"num_shards={num_shards}: take the rank on the cp axis, not the global one."
        )


def check_dim(subject: str, x: Tensor, dim: int) -> None:
    """Refuse anything but a tensor, or a dim that it does not have."""
    check_tensor(subject, x=x)
    check_ints(subject, dim=dim)
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(
            f"{subject} reads one dim of a tensor, got x.shape={tuple(x.shape)}, dim={dim}: name "
            f"the sequence's dim, from {-x.ndim} to {x.ndim - 1}."
        )


def check_batch(subject: str, batch: Mapping[str, Any], *keys: str) -> None:
    """Refuse anything but a mapping, or one without these keys.

    Raises:
        TypeError: not a mapping.
        KeyError: a key that is missing, or None.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"{subject} is a mapping of keys to tensors, got batch of type "
            f"{type(batch).__name__}: give a dict."
        )
    for key in keys:
        if batch.get(key) is None:
            raise KeyError(f"{key}: {subject[:1].lower()}{subject[1:]} has it, got none.")


def check_tensor(
    subject: str,
    *,
    shape: str = "",
    ndim: int | None = None,
    dtypes: Collection[torch.dtype] = (),
    **tensors: Any,
) -> None:
    """Refuse anything but a tensor, or one of another number of dims or another dtype.

    Args:
        shape: as the sentence gives it, in brackets.
        dtypes: those that are read; empty for any.
    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another number of dims.
    """
    for name, x in tensors.items():
        wanted = f"{name} {shape}".strip()
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{subject} reads a tensor, got {name} of type {type(x).__name__}: give {wanted}."
            )
        if ndim is not None and x.ndim != ndim:
            raise ValueError(
                f"{subject} reads {wanted}, got {name}.shape={tuple(x.shape)}: give all its dims."
            )
        if dtypes and x.dtype not in dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(
                f"{subject} reads {wanted}, got {name}.dtype={x.dtype}: convert it to {names}."
            )


def rows_of(subject: str, name: str, x: Any) -> tuple[int, int]:
    """(rows, tokens per row) of what a model reads, [B, S, ...].

    Raises:
        TypeError: not a tensor.
        ValueError: no rows, or rows without a token.
    """
    tensors: dict[str, Any] = {name: x}
    check_tensor(subject, shape="[B, S, ...]", **tensors)
    if x.ndim < 2 or not x.shape[0] or not x.shape[1]:
        raise ValueError(
            f"{subject} has rows of one token or more, got {name}.shape={tuple(x.shape)}: give "
            f"[B, S], or embeddings [B, S, E]."
        )
    return x.shape[0], x.shape[1]


def check_factor(subject: str, learned: str = "q", **factors: Any) -> None:
    """Refuse a factor that is not a plain number: a tensor would lose its gradient in an op.

    Args:
        subject: what is scaled.
        learned: what to multiply by a factor that has a gradient.
    """
    for name, factor in factors.items():
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            raise TypeError(
                f"{subject} are scaled by one number, got {name}={factor!r} of type "
                f"{type(factor).__name__}: give a float, and multiply {learned} by a factor that "
                f"is learned."
            )


def check_scale(scale: Any) -> None:
    """Refuse a scale of scores that is not a finite number."""
    check_factor("Scores", scale=scale)
    if not -math.inf < scale < math.inf:  # dynamo traces no math.isfinite of a symbol
        raise ValueError(
            f"Scores are scaled by a finite number, got scale={scale}: give one, or None."
        )
