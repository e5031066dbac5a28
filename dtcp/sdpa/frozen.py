"""The forward pass of a frozen model on a sharded sequence, its outputs whole on every rank.

A draft model learns from the hidden states and logits of a target that is not trained (EAGLE-3,
https://arxiv.org/abs/2503.01840). The target runs on contiguous shards: nothing is kept for a
backward pass, so balance gains little, and each output is whole again after one all-gather.
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
from dtcp.mixer_plan import find
from dtcp.sdpa.local_shards import local_shards
from dtcp.sequence.arguments import check_dim, check_ints, check_kind, check_tensor, rows_of
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous
from dtcp.softmax.style import AttentionStyle


class TargetShard(NamedTuple):
    """This rank's inputs of a target, and the context to run it in."""

    context: AbstractContextManager[Any]
    input_ids: Tensor  # [B, L]
    position_ids: Tensor  # [B, L]
    unpadded_len: int


class TargetOutputs(NamedTuple):
    """What a target computed, whole and in order, on every rank."""

    logits: Tensor  # [B, S, V]
    hidden_states: dict[str, Tensor]  # [B, S, D] by module name


class FrozenTarget:
    """A target whose attention is torch's scaled_dot_product_attention, on plain tensors.

    Args:
        model: called with input_ids and position_ids; returns logits, or a mapping with them.
        axis: the 1-D axis of the sequence; None: one device.
        capture: names of modules (or patterns) whose outputs are wanted beside the logits.
        style: how attention is carried out; None for RingAttention().
    Raises:
        ValueError: a model that takes no position_ids, or a name that matches no module.

    Example::
        target = FrozenTarget(model, mesh.cp, capture=("model.layers.2", "model.layers.17"))
        logits, hidden_states = target(input_ids)
    """

    def __init__(
        self,
        model: nn.Module,
        axis: DeviceMesh | None,
        *,
        capture: Sequence[str] = (),
        style: AttentionStyle | None = None,
    ) -> None:
        check_kind("FrozenTarget", nn.Module, model=model)
        check_kind("FrozenTarget", (DeviceMesh, type(None)), axis=axis)
        check_kind("FrozenTarget", (AttentionStyle, type(None)), style=style)
        check_kind("FrozenTarget", (list, tuple, set, frozenset), capture=capture)
        if "position_ids" not in signature(model.forward).parameters:
            raise ValueError(
                f"A target on shards reads the positions of its tokens, got "
                f"{type(model).__name__}, whose forward has no position_ids: add the argument."
            )
        self.model, self.axis, self.style = model, axis, style
        modules = find(model, capture) if capture else {}
        self.captured = {name: _capturing(module) for name, module in modules.items()}

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, position_ids: Tensor | None = None, **inputs: Any
    ) -> TargetOutputs:
        """Run on whole rows, equal on every rank of the axis.

        Args:
            input_ids: [B, S].
            position_ids: [B, S] or [1, S], restarting with each document; None counts from 0.
            inputs: anything else the model takes, passed on unchanged.
        Raises:
            ValueError: positions that do not count up, or attention that did not run sharded.

        Traffic per rank: that of the attention, and (n - 1) * L of the logits and of each
        captured output.
        """
        context, ids, position_ids, length = shard_target_inputs(
            self.axis, input_ids, position_ids, style=self.style
        )
        for module in self.captured.values():
            module.captured_output = None
        with context:
            out = self.model(input_ids=ids, position_ids=position_ids, **inputs)
        if isinstance(context, local_shards) and not context.attended:
            raise ValueError(
                f"Attention on shards goes through scaled_dot_product_attention, got "
                f"{type(self.model).__name__}, which did not call it: choose it."
            )
        logits = out["logits"] if isinstance(out, Mapping) else out
        names = list(self.captured)
        missed = [name for name in names if self.captured[name].captured_output is None]
        if missed:
            raise ValueError(
                f"A module whose output is captured runs and returns a tensor first, got "
                f"{missed} without one: name others."
            )
        local = [logits, *(self.captured[name].captured_output for name in names)]
        for module in self.captured.values():
            module.captured_output = None
        logits, *hidden = gather_outputs(self.axis, local, length)
        return TargetOutputs(logits, dict(zip(names, hidden, strict=True)))


def shard_target_inputs(
    axis: DeviceMesh | None,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    *,
    style: AttentionStyle | None = None,
) -> TargetShard:
    """Cut whole rows into contiguous shards, out of place; padding on the right fills the last.

    Args:
        input_ids: [B, S].
        position_ids: [B, S] or [1, S], restarting with each document; None counts from 0.
    """
    check_tensor("A target", shape="[B, S]", ndim=2, input_ids=input_ids)
    rows, length = rows_of("A target", "input_ids", input_ids)
    device = input_ids.device
    if position_ids is None:
        position_ids = torch.arange(length, device=device)[None]
    check_tensor("A target", shape="[B, S]", ndim=2, position_ids=position_ids)
    if position_ids.shape not in ((rows, length), (1, length)):
        raise ValueError(
            f"A target reads the positions of its tokens, got position_ids.shape="
            f"{tuple(position_ids.shape)} for {rows} rows of {length}: give [B, S] or [1, S]."
        )
    position_ids = position_ids.expand(rows, -1)
    if axis is None or axis.size() == 1:
        whole = (input_ids.contiguous(), position_ids.to(device).contiguous())
        return TargetShard(nullcontext(), *whole, length)
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
    return TargetShard(context, ids, position_ids, length)


@torch.no_grad()
def gather_outputs(
    axis: DeviceMesh | None, tensors: Sequence[Tensor], unpadded_len: int, *, dim: int = 1
) -> list[Tensor]:
    """Whole tensors in order from contiguous shards, padding taken off; contiguous.

    Traffic per rank: (n - 1) * L tokens of each.
    """
    if not isinstance(tensors, Sequence):
        raise TypeError(
            f"The outputs of a target are a list, got tensors of type {type(tensors).__name__}: "
            f"give [x] for one."
        )
    check_ints("A target", least=0, unpadded_len=unpadded_len)
    whole = []
    for x in tensors:
        check_dim("A target", x, dim)
        local = x.to_local() if isinstance(x, DTensor) else x
        if axis is not None and axis.size() > 1:
            layout = Contiguous(local.shape[dim] * axis.size(), axis.size())
            local = relayout.gather(local, layout, axis, dim=dim % local.ndim)
        if local.shape[dim] < unpadded_len:
            raise ValueError(
                f"Padding is taken off the outputs of a target, got unpadded_len={unpadded_len} "
                f"with whole shape {tuple(local.shape)}, dim={dim}: give what the target's "
                f"inputs were before padding."
            )
        whole.append(local.narrow(dim, 0, unpadded_len).contiguous())
    return whole


class _Capturing(nn.Module):
    """Keeps what its last call returned. A class, not a hook, which compiled code may not see."""

    captured_output: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = super().forward(*args, **kwargs)
        first = result[0] if isinstance(result, tuple) else result
        self.captured_output = first.detach()
        return result


def _capturing(module: nn.Module) -> _Capturing:
    """Give a module a class that keeps its output."""
    if not isinstance(module, _Capturing):
        module.__class__ = _capturing_class(cast(Hashable, type(module)))
    return cast(_Capturing, module)


@lru_cache(maxsize=128)
def _capturing_class(cls: Hashable) -> type[nn.Module]:
    base = cast(type[nn.Module], cls)
    return type(f"Capturing{base.__name__}", (_Capturing, base), {})
