"""How a model of transformers gets the positions of its tokens, and is given those of a shard.

A batch counts each document from 0. Some models count from another number (RoBERTa and its kin,
after the padding id), and some do not take positions at all: they count their input from its start
(BART's decoder and its kin), and a shard does not start where its row does. In both cases the
module that looks positions up takes them as an argument, and is given those of the batch; one that
takes ids instead is replaced (position_tables.py).
"""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dtcp.forward import wrap_forward
from dtcp.huggingface.position_tables import is_position_table, sines_of_positions
from dtcp.metadata import BatchMetadata
from dtcp.rows import Rows

_TABLE = re.compile(r"(^|\.)(wpe|(?!.*relative)\w*position\w*)$")
"""Names of tables of positions; those of relative ones are buckets of distances."""
_LONGEST = "dtcp_longest_document"
KEY, DECODER_KEY = "position_ids", "decoder_position_ids"
_RULE, _GIVEN = "dtcp_positions", "dtcp_position_ids"


@dataclass(frozen=True)
class Positions:
    """How positions reach a model.

    Args:
        offset: the position of a row's first token, as the model counts.
        readers: modules that look positions up, and are handed those of the batch; without any,
            the model itself is handed them, as it counts.
        taken: whether the model itself takes them, and hands them on.
        encoder: the name of the encoder in a model that has one; all other readers are handed the
            positions of the decoder's tokens.
    """

    offset: int = 0
    readers: tuple[str, ...] = ()
    taken: bool = True
    encoder: str = ""


def takes_positions(module: nn.Module) -> bool:
    """Whether the forward of a module names positions among its arguments."""
    return KEY in inspect.signature(type(module).forward).parameters


def position_readers(model: nn.Module) -> tuple[str, ...]:
    """Modules outside of lists of layers that take positions, the innermost ones."""
    names = [
        name
        for name, module in model.named_modules()
        if name and (takes_positions(module) or is_position_table(module))
        if not any(part.isdigit() for part in name.split("."))
    ]
    return tuple(name for name in names if not any(other.startswith(f"{name}.") for other in names))


def longest(model: nn.Module, offset: int | None, inside: str = "") -> int | None:
    """How many positions a model has learned; None where it looks them up in no table.

    Args:
        offset: the position of a row's first token, as the model counts; None where it is not
            known: then behind the number of padding, where a table has one.
        inside: the name of the module that reads tokens; other tables are those of images.
    """

    def skipped(table: nn.Embedding) -> int:
        behind_padding = 0 if table.padding_idx is None else table.padding_idx + 1
        return getattr(table, "offset", behind_padding if offset is None else offset)

    sizes = [
        module.num_embeddings - skipped(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and _TABLE.search(name) and name.startswith(inside)
    ]
    return min(sizes, default=None)


def note_longest(model: nn.Module, positions: Positions, inside: str = "") -> None:
    """Record how many positions a model has learned, to refuse longer documents."""
    vars(model)[_LONGEST] = longest(model, positions.offset, inside)


def check_longest(rows: Rows, model: nn.Module) -> None:
    """Refuse tokens beyond the positions that the model has learned, before ranks look them up.

    Raises:
        ValueError: naming the row.
    """
    noted = (vars(module)[_LONGEST] for module in model.modules() if _LONGEST in vars(module))
    most = next(noted, None)
    if most is None:
        return
    of_answers = "prefix" in rows.for_masks  # whose positions start again, inside a document
    for row, lengths in enumerate(rows.documents.lengths):
        if max(lengths, default=0) > most and (rows.counted[row] or not of_answers):
            raise ValueError(
                f"A document has as many tokens as its model has learned positions, got one of "
                f"{max(lengths)} in row {row} for a {type(model).__name__} with {most}: cut rows "
                f"to {most} tokens."
            )
    position_ids = rows.tokens.get(KEY)
    if position_ids is None or all(rows.counted):
        return
    wrong = (position_ids < 0) | (position_ids >= most)
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"Positions are those that a model has learned, got position_ids{[*at]}="
            f"{position_ids[at].item()} for a {type(model).__name__} with {most}: count from 0 to "
            f"{most - 1}, in padding, too."
        )


@contextmanager
def reading_positions(model: nn.Module, positions: Positions) -> Iterator[None]:
    """Inside, readers of positions get those of the batch, if there are any."""
    readers = [model.get_submodule(name) for name in positions.readers]
    for reader in readers:
        vars(reader)[_RULE] = positions, False, _index(reader)
        # Not by wrap_forward, which is for good.
        around = partial(_read, reader, reader.forward)
        reader.forward = around
    try:
        yield
    finally:
        for reader in readers:
            del vars(reader)[_RULE], reader.forward


def install_positions(model: nn.Module, positions: Positions) -> None:
    """Give readers of positions those of the batch, and refuse calls without."""
    for name in positions.readers:
        reader = model.get_submodule(name)
        vars(reader)[_RULE] = positions, True, _index(reader)
        wrap_forward(reader, _read)


@contextmanager
def given_positions(
    model: nn.Module, positions: Positions, value: Tensor, of_decoder: Tensor
) -> Iterator[None]:
    """Inside, readers of a model that takes no positions are handed these: [B, L] each."""
    readers = [model.get_submodule(name) for name in positions.readers]
    for name, reader in zip(positions.readers, readers, strict=True):
        inside = name.startswith(f"{positions.encoder}.")
        vars(reader)[_GIVEN] = value if inside else of_decoder
    try:
        yield
    finally:
        for reader in readers:
            del vars(reader)[_GIVEN]


def call_with_positions(
    model: nn.Module, positions: Positions, run: Callable[..., Any], **kwargs: Any
) -> Any:
    """Call a model with position_ids among the arguments, whether it takes them or not.

    Padding that a layout adds counts on, maybe beyond what the model has learned. Tokens there
    are for its table to refuse.
    """
    batch, most = kwargs.get("attn_metadata"), vars(model).get(_LONGEST)
    if most is not None and isinstance(batch, BatchMetadata):
        first = batch if batch.memory is None else batch.memory
        for key, own in ((KEY, first), (DECODER_KEY, batch)):
            ids = kwargs.get(key)
            if isinstance(ids, Tensor) and own.real is not None:
                kwargs[key] = torch.where(own.real, ids, ids.clamp(max=most - 1))
    if positions.taken and not positions.readers and positions.offset:
        kwargs[KEY] = kwargs[KEY] + positions.offset
    if positions.taken:
        return run(**kwargs)
    value = kwargs.pop(KEY)
    with given_positions(model, positions, value, kwargs.pop(DECODER_KEY, value)):
        return run(**kwargs)


def _index(reader: nn.Module) -> int | None:
    """The index of positions among the arguments of a reader's forward; None if it takes ids."""
    if is_position_table(reader):
        return None
    return list(inspect.signature(type(reader).forward).parameters).index(KEY) - 1


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], index: int | None) -> Any:
    return args[index] if index is not None and index < len(args) else kwargs.get(KEY)


def _read(reader: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A reader's forward, on the positions of the batch."""
    rule, needed, index = getattr(reader, _RULE)
    position_ids = getattr(reader, _GIVEN, None)
    value = position_ids if not rule.taken else _argument(args, kwargs, index)
    if value is None and needed:
        raise ValueError(
            f"A model is given the positions of its batch by its own forward, got a call of "
            f"{type(reader).__name__} without any: call the model that parallelize_hf returned, "
            f"with the position_ids of shard_hf_batch."
        )
    if value is None:
        return forward(*args, **kwargs)
    if index is None:
        return sines_of_positions(reader, args[0] if args else kwargs.get("input_ids"), value)
    if index < len(args):
        return forward(*args[:index], value + rule.offset, *args[index + 1 :], **kwargs)
    out = forward(*args, **{**kwargs, KEY: value + rule.offset})
    # Some readers expect the positions of one row, and add a dim for it.
    more = position_ids is not None and isinstance(out, Tensor) and out.ndim > value.ndim + 1
    return out.reshape(*value.shape, -1) if more else out
