"""Heads that give one output per row: found by running the model, and followed by a mixer.

Which module is the head, and which token it reads, is tested, not read from names: rows of several
lengths are run, and the model's output for a row has to equal what one of its modules gave for the
row's last token.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dtcp.forward import wrap_forward
from dtcp.huggingface import registry
from dtcp.huggingface.last_token import LastToken
from dtcp.huggingface.mixing_probe import probe_ids, tensors
from dtcp.huggingface.padding_ids import padding_token
from dtcp.sequence.documents import Documents


@dataclass(frozen=True)
class PooledHead:
    """The module whose outputs for a row's last token are the model's outputs for the row."""

    name: str
    pad_token_id: int | None


def outputs_of_rows(out: object, seq_len: int, memory_len: int = 0) -> list[Tensor]:
    """The outputs without a token dim of a model that ran on one row of seq_len tokens.

    Args:
        memory_len: tokens of the encoder's row; 0 without one.
    """
    lengths = {seq_len, memory_len or seq_len}
    return [x for x in tensors(out) if x.is_floating_point() and lengths.isdisjoint(x.shape)]


def find_pooled_head(
    model: Any, run: Callable[[Tensor], object], seq_len: int
) -> PooledHead | None:
    """The head of a model that gives outputs for rows; None if it is not one of the last token.

    Args:
        run: one forward of the model on input_ids, in eval mode.
    """
    pad_token_id = padding_token(model)
    lengths, ids = [seq_len], probe_ids(model, seq_len)
    if pad_token_id is not None:
        lengths = [seq_len, seq_len // 2, 3]
        in_row = torch.arange(seq_len) < torch.tensor(lengths)[:, None]
        ids = ids.where(in_row.to(ids.device), pad_token_id)
    output_of: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, __: Any, out: object) -> None:
            if isinstance(out, Tensor) and out.shape[:2] == ids.shape:
                output_of[name] = out

        return keep

    with ExitStack() as hooks, torch.no_grad():
        for name, module in _heads(model):
            hooks.enter_context(module.register_forward_hook(note(name)))
        outputs = outputs_of_rows(run(ids), seq_len)
    last = [length - 1 for length in lengths]
    for name, out in reversed(output_of.items()):
        expected = out[torch.arange(len(lengths)), last].flatten()
        if all(x.numel() == len(expected) and x.flatten().allclose(expected) for x in outputs):
            return PooledHead(name, pad_token_id)
    return None


def install_pooled_head(model: nn.Module, head: PooledHead) -> None:
    """Put the mixer after the head, and show it each batch that the model is called with."""
    module = model.get_submodule(head.name)
    module.add_module(registry.MIXER, LastToken(head.pad_token_id))
    # A hook, as nothing is compiled here, and tensor parallelism may replace the forward.
    module.register_forward_hook(_spread)
    wrap_forward(model, _read_batch)


def last_token_mixer(model: nn.Module) -> LastToken | None:
    """The mixer behind the head of a model that pools."""
    return next((m for m in model.modules() if isinstance(m, LastToken)), None)


def check_last_tokens(input_ids: Tensor, documents: Documents, pad_token_id: int | None) -> None:
    """Refuse rows whose last token differs between ids and padding.

    Args:
        input_ids: [B, S].
    """
    counts = torch.ones_like(input_ids) if pad_token_id is None else input_ids != pad_token_id
    last = (torch.arange(input_ids.shape[1]) * counts.cpu()).argmax(1)
    for row, (token, lengths) in enumerate(zip(last.tolist(), documents.lengths, strict=True)):
        if token >= sum(lengths):
            raise ValueError(
                f"A head that pools reads a row's last token with another id than "
                f"config.pad_token_id={pad_token_id}, got token {token} of row {row}, which is "
                f"padding by the attention_mask: pad rows with config.pad_token_id."
            )


def check_pad_token(model: Any, head: LastToken) -> None:
    """Refuse a padding token other than at the time the head was found: TRL may set one."""
    pad_token_id = padding_token(model)
    if pad_token_id != head.pad_token_id:
        raise ValueError(
            f"A head that pools reads last tokens by the padding token that its model was put on "
            f"its mesh with, got config.pad_token_id={pad_token_id} for {head.pad_token_id}: set "
            f"it before parallelize_hf, or give a Trainer the model as it was built."
        )


def _heads(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    trunk = getattr(model, "base_model", model)
    for name, module in model.named_children():
        if module is not trunk:
            yield name, module


def _spread(head: nn.Module, _: Any, out: Tensor) -> Tensor:
    return head.get_submodule(registry.MIXER)(out)


def _read_batch(model: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    mixer = last_token_mixer(model)
    assert mixer is not None
    with mixer.reading(kwargs.get("input_ids"), kwargs["attn_metadata"]):
        return forward(*args, **kwargs)
