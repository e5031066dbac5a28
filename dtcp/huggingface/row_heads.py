"""Heads that read whole rows (a mean, the first token): found by trial, and run on joined rows.

Either a module pools what it is given (`RowHead.name`: BERT's pooler, RoBERTa's head), and is
given whole rows; or the model's own forward does, behind the trunk: then that is called with whole
rows, as one device calls it, the trunk reads this rank's part of them, and what it gives is put
together. Nothing in a head has to be known but what was tried: of what it reads the trunk's last
hidden states alone are joined.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dtcp.forward import wrap_forward
from dtcp.huggingface import registry
from dtcp.huggingface.joined_rows import JoinRows
from dtcp.huggingface.pooled_head import last_token_mixer
from dtcp.huggingface.row_trials import (
    MASK,
    ModuleTrial,
    TrunkTrial,
    hidden_of,
    rows_stand_still,
    takes_mask,
    with_hidden,
    with_numbers,
)
from dtcp.sequence.documents import Documents


@dataclass(frozen=True)
class RowHead:
    """What reads whole rows.

    Args:
        name: of the module; empty for the model's own forward, behind its trunk.
        reads_padding: whether what comes of a row depends on the padding behind it.
        outputs: names of those of the model that are of rows.
        rows_alone: whether there are none of tokens.
    """

    name: str
    reads_padding: bool
    outputs: tuple[str, ...]
    rows_alone: bool

    @property
    def mixer(self) -> str:
        """The name of its mixer."""
        return f"{self.name}.{registry.MIXER}".lstrip(".")


def find_row_heads(
    model: Any,
    find_mixing: Callable[[], list[str]],
    run: Callable[..., object],
    seq_len: int,
    attentions: Mapping[str, object],
) -> tuple[list[RowHead], list[str]]:
    """The heads of a model that read whole rows; and modules in which tokens meet otherwise.

    Args:
        find_mixing: names the innermost modules in which tokens meet.
        run: one forward of the model, given input_ids.
        attentions: by the names of their modules.
    """
    heads: list[RowHead] = []
    with torch.no_grad(), torch.random.fork_rng():
        with ExitStack() as known:
            while mixing := find_mixing():
                names = [name for name in mixing if name and not _around(name, attentions)]
                trials = [ModuleTrial(model, name, run, seq_len) for name in names]
                found = [trial for trial in trials if trial.pools()]
                heads += [RowHead(x.name, x.reads_padding(), *x.of_rows()) for x in found]
                if not found:
                    break
                # What pools around these shows once they give what they gave.
                for trial in found:
                    known.enter_context(trial.constant())
            if not mixing and rows_stand_still(model, run, seq_len):
                return heads, []
        trunk = trunk_name(model)
        if trunk and not any(_within(name, trunk) for name in mixing):
            of_trunk = TrunkTrial(model, trunk, run, seq_len)
            if of_trunk.pools():
                own = RowHead("", of_trunk.reads_padding(), *of_trunk.of_rows())
                return [*(head for head in heads if _within(head.name, trunk)), own], []
    return [], mixing


def _within(name: str, trunk: str) -> bool:
    return f"{name}.".startswith(f"{trunk}.")


def trunk_name(model: Any) -> str:
    """The name of the model inside of a model; empty without one."""
    trunk = model.base_model
    return next((name for name, x in model.named_children() if x is trunk), "")


def _around(name: str, attentions: Mapping[str, object]) -> bool:
    """Whether a module holds attention, or is part of a block."""
    in_block = any(part.isdigit() for part in name.split("."))
    return in_block or any(each.startswith(f"{name}.") for each in attentions)


def dropped_in_heads(model: Any, heads: Collection[RowHead], names: Iterable[str]) -> Iterator[str]:
    """What refuses dropouts of tokens that run on whole rows, in sentences."""
    trunk = trunk_name(model)
    for name in names:
        if any(_within(name, x.name) if x.name else not _within(name, trunk) for x in heads):
            yield (
                f"{name} ({type(model.get_submodule(name)).__name__}): drops tokens of whole rows, "
                f"of which a rank knows its own alone: set it to 0.0."
            )


def install_row_heads(model: Any, heads: tuple[RowHead, ...]) -> None:
    """Give heads that read whole rows their mixers; before what checks calls of the model."""
    for head in heads:
        module = model.get_submodule(head.name)
        mixer = JoinRows(rows_alone=head.rows_alone, reads_padding=head.reads_padding)
        module.add_module(registry.MIXER, mixer)
        wrap_forward(module, _on_joined if head.name else _on_whole_rows)
    if heads:
        vars(model)[_OF_ROWS] = heads[0].outputs
        wrap_forward(model, _read_batch)


_OF_ROWS, _GIVEN = "dtcp_outputs_of_rows", "dtcp_given_rows"


def install_trunk(model: Any, heads: tuple[RowHead, ...]) -> None:
    """Let the trunk of a model that is called with whole rows read its shard; around all else."""
    if any(not head.name for head in heads):
        trunk = model.get_submodule(trunk_name(model))
        wrap_forward(trunk, _on_shard)


def joining_mixers(model: nn.Module) -> tuple[JoinRows, ...]:
    """Those of the heads that read whole rows."""
    return tuple(x for x in model.modules() if isinstance(x, JoinRows))


def gives_rows(model: nn.Module) -> bool:
    """Whether a model with mixers gives one output per row, and none of tokens."""
    alone = any(mixer.rows_alone for mixer in joining_mixers(model))
    return alone or last_token_mixer(model) is not None


def check_pooled_rows(model: nn.Module, documents: Documents, seq_len: int) -> None:
    """Refuse rows of which a head would make one output where it should be several, or another.

    Args:
        seq_len: tokens per row, as they were given.
    Raises:
        ValueError: packed documents, or padding that is read.
    """
    for mixer in joining_mixers(model):
        for row, lengths in enumerate(documents.lengths):
            if mixer.rows_alone and len(lengths) > 1:
                raise ValueError(
                    f"A head that pools gives one output per row, got {len(lengths)} documents in "
                    f"row {row}: give each document a row of its own."
                )
            if mixer.reads_padding and sum(lengths) < seq_len:
                raise ValueError(
                    f"{type(model).__name__} pools padding as it does tokens, got {sum(lengths)} "
                    f"tokens in row {row} of {seq_len}: give rows of one length."
                )


def _read_batch(model: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    mixers = joining_mixers(model)
    with ExitStack() as reading:
        for mixer in mixers:
            reading.enter_context(mixer.reading(kwargs["attn_metadata"]))
        out = forward(*args, **kwargs)
    if not isinstance(out, Mapping):
        raise ValueError(
            f"Outputs of rows are known by their names, got a {type(out).__name__} of a "
            f"{type(model).__name__}: leave return_dict=False out."
        )
    of_rows = {key: mixers[0].shared(out[key]) for key in vars(model)[_OF_ROWS] if key in out}
    return type(out)(**{**out, **of_rows})


def _on_joined(head: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A module that pools, on whole rows of what it is given."""
    mixer: Any = head.get_submodule(registry.MIXER)
    args = tuple(with_numbers(x, mixer) for x in args)
    kwargs = {key: with_numbers(x, mixer) for key, x in kwargs.items()}
    return forward(*args, **kwargs)


def _on_whole_rows(model: Any, forward: Callable[..., Any], **kwargs: Any) -> Any:
    """A model's own forward on whole rows; its trunk is called with what stands for them here."""
    mixer, trunk = model.get_submodule(registry.MIXER), model.base_model
    shard_len = len(mixer.of_batch().token_index)
    local = {
        key: x
        for key, x in kwargs.items()
        if isinstance(x, Tensor) and x.ndim > 1 and x.shape[1] == shard_len
    }
    whole = {key: mixer(x) for key, x in local.items()}
    given: list[tuple[Tensor, Tensor | None]] = [(whole[key], x) for key, x in local.items()]
    if takes_mask(model):
        whole[MASK] = mixer.mask()
        given.append((whole[MASK], None))
    vars(trunk)[_GIVEN] = mixer, given
    try:
        return forward(**{**kwargs, **whole})
    finally:
        del vars(trunk)[_GIVEN]


def _on_shard(trunk: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A trunk's forward on this rank's part of the rows, and what it gives put together."""
    if not hasattr(trunk, _GIVEN):
        return forward(*args, **kwargs)
    mixer, given = getattr(trunk, _GIVEN)
    local = {id(whole): x for whole, x in given}
    args = tuple(local.get(id(x), x) for x in args)
    kwargs = {key: local.get(id(x), x) for key, x in kwargs.items()}
    out = forward(*args, **kwargs)
    return with_hidden(out, mixer(hidden_of(out)))
