"""A model that is only read: its forward sharded over the sequence, what was asked for whole.

A draft model learns from the hidden states and logits of a target that is not trained (EAGLE-3).
The target reads contiguous shards: nothing is kept for a backward pass, so balance buys little,
and its results are whole again after one all-gather each.
"""

from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from inspect import signature
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dtcp.distributed import relayout
from dtcp.plan import find
from dtcp.sdpa.local_shards import local_shards
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous
from dtcp.softmax.style import AttentionStyle


class ReadShard(NamedTuple):
    """This rank's part of what a target reads, and the context it is read in."""

    context: AbstractContextManager[Any]
    input_ids: Tensor  # [B, L]
    position_ids: Tensor  # [B, L]
    unpadded_len: int


class Reading(NamedTuple):
    """What a target gave, whole and in order, on every rank."""

    logits: Tensor  # [B, S, V]
    taps: dict[str, Tensor]  # [B, S, D] by module name


class FrozenTarget:
    """A target whose attention is torch's scaled_dot_product_attention, on plain tensors.

    Args:
        model: called with input_ids and position_ids; returns logits, or a mapping with them.
        axis: the 1-D axis of the sequence; None: one device.
        taps: names of modules (or patterns) whose output is wanted.
        style: how attention is carried out; None for RingAttention().
    Raises:
        ValueError: a model that takes no position_ids, or a tap that names no module.
    """

    def __init__(
        self,
        model: nn.Module,
        axis: DeviceMesh | None,
        *,
        taps: Sequence[str] = (),
        style: AttentionStyle | None = None,
    ) -> None:
        if "position_ids" not in signature(model.forward).parameters:
            raise ValueError(
                f"A target on shards is told the position of its tokens, got "
                f"{type(model).__name__}, whose forward has no position_ids: add the argument."
            )
        self.model, self.axis, self.style = model, axis, style
        found = find(model, taps) if taps else {}
        self.tapped = {name: _tap(module) for name, module in found.items()}

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, position_ids: Tensor | None = None, **inputs: Any
    ) -> Reading:
        """Read whole rows, alike on every rank of the axis.

        Args:
            input_ids: [B, S].
            position_ids: [B, S] or [1, S], restarting with each document; None counts from 0.
            inputs: anything else the model takes, as it is.
        Raises:
            ValueError: positions that do not count up, or attention that did not run sharded.

        Traffic per rank: that of the attention, and (n - 1) * L of the logits and each tap.
        """
        context, ids, position_ids, length = read_shard(
            self.axis, input_ids, position_ids, style=self.style
        )
        for module in self.tapped.values():
            module.tap = None
        with context:
            out = self.model(input_ids=ids, position_ids=position_ids, **inputs)
        if isinstance(context, local_shards) and not context.attended:
            raise ValueError(
                f"Attention on shards goes by scaled_dot_product_attention, got "
                f"{type(self.model).__name__}, which did not call it: choose it."
            )
        logits = out["logits"] if isinstance(out, Mapping) else out
        names = list(self.tapped)
        missed = [name for name in names if self.tapped[name].tap is None]
        if missed:
            raise ValueError(
                f"A tap is a module that runs and returns a tensor first, got {missed} without "
                f"one: name others."
            )
        parts = [logits, *(self.tapped[name].tap for name in names)]
        for module in self.tapped.values():
            module.tap = None
        logits, *hidden = gather_read(self.axis, parts, length)
        return Reading(logits, dict(zip(names, hidden, strict=True)))


def read_shard(
    axis: DeviceMesh | None,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    *,
    style: AttentionStyle | None = None,
) -> ReadShard:
    """Cut whole rows into contiguous shards, out of place; padding on the right fills the last.

    Args:
        input_ids: [B, S].
        position_ids: [B, S] or [1, S], restarting with each document; None counts from 0.
    """
    rows, length = input_ids.shape
    device = input_ids.device
    if position_ids is None:
        position_ids = torch.arange(length)[None]
    position_ids = position_ids.expand(rows, -1)
    if axis is None or axis.size() == 1:
        whole = (input_ids.contiguous(), position_ids.to(device).contiguous())
        return ReadShard(nullcontext(), *whole, length)
    n, rank = axis.size(), axis.get_local_rank()
    layout = Contiguous(-(-length // n) * n, n)
    documents = Documents.from_position_ids(position_ids.cpu()).padded(layout.seq_len)
    missing = layout.seq_len - length
    ids = torch.nn.functional.pad(input_ids, (0, missing))
    # Padding goes on counting: a model that looks for documents by position finds none there.
    more = position_ids[:, -1:] + torch.arange(1, missing + 1, device=position_ids.device)
    position_ids = torch.cat((position_ids, more), dim=1).to(device)
    ids, position_ids = layout.shard(ids, rank), layout.shard(position_ids, rank)
    context = local_shards(
        layout, axis, documents=documents, position_ids=position_ids, style=style, device=device
    )
    return ReadShard(context, ids, position_ids, length)


@torch.no_grad()
def gather_read(
    axis: DeviceMesh | None, tensors: Sequence[Tensor], unpadded_len: int, *, dim: int = 1
) -> list[Tensor]:
    """Whole tensors in order from contiguous shards, padding taken off; contiguous.

    Traffic per rank: (n - 1) * L tokens of each.
    """
    whole = []
    for x in tensors:
        local = x.to_local() if isinstance(x, DTensor) else x
        if axis is not None and axis.size() > 1:
            layout = Contiguous(local.shape[dim] * axis.size(), axis.size())
            local = relayout.gather(local, layout, axis, dim=dim % local.ndim)
        whole.append(local.narrow(dim, 0, unpadded_len).contiguous())
    return whole


class _Tapped(nn.Module):
    """Keeps what its last call returned. A class, not a hook, which compiled code may not see."""

    tap: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        first = out[0] if isinstance(out, tuple) else out
        self.tap = first.detach()
        return out


def _tap(module: nn.Module) -> _Tapped:
    if not isinstance(module, _Tapped):
        module.__class__ = _tapped(cast(Hashable, type(module)))
    return cast(_Tapped, module)


@lru_cache(maxsize=128)
def _tapped(cls: Hashable) -> type[nn.Module]:
    kind = cast(type[nn.Module], cls)
    return type(f"Tapped{kind.__name__}", (_Tapped, kind), {})
