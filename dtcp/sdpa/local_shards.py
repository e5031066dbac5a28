"""Attention of models that know nothing of meshes: inside a context their tensors are shards.

A model that calls F.scaled_dot_product_attention on plain tensors is given a shard of every row.
Inside `local_shards` each such call attends over the whole sequence, eager or in a graph, and its
backward needs no context. A module can ask whether such a context is open, so that what must not
attend to its shard alone can refuse to (`ask_layout`, `ask_attended`).

Questions are ops: a mode sees ops wherever they are called, traced code included, so nobody has
to keep which context is open in a place that all would share.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from dtcp.compile import (
    SWITCH_GRADIENTS,
    assert_in_graph,
    backward_unasked,
    is_recomputed_elsewhere,
    recompute_inside,
)
from dtcp.sdpa.rules import SDPA_SEQ, sequence_layout
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import SequenceLayout
from dtcp.softmax.style import AttentionStyle


def _question(name: str) -> Callable[..., Any]:
    """An op that says nothing: an open context answers True or False in its place.

    It returns a tensor since graphs hold no other results.
    """

    def nobody_answers(x: Tensor) -> Tensor:
        return x.new_empty(0)

    op = torch.library.custom_op(f"dtcp::{name}", nobody_answers, mutates_args=())
    op.register_fake(nobody_answers)
    return op._opoverload


_LAYOUT, _ATTENDED, _CAUSAL = (_question(f"ask_{x}") for x in ("layout", "attended", "causal"))


def ask_layout(x: Tensor) -> bool:
    """Whether a context is open here, in which this tensor would be a shard."""
    return _LAYOUT(x) is True


def ask_attended(x: Tensor) -> bool:
    """Whether attention over the whole sequence has run here since the last `ask_layout`."""
    return _ATTENDED(x) is True


def ask_causal(mask: Tensor) -> bool:
    """Whether this mask, of a model that sees its shard alone, says what `is_causal` says."""
    return _CAUSAL(mask) is True


class local_shards(sequence_layout):
    """Inside, plain tensors too are shards of the sequence, not only DTensors.

    Args:
        layout: of the sequence, over the ranks of `axis`.
        axis: the 1-D mesh the sequence is sharded on.
        documents: of every row; None for one document a row.
        position_ids: what the model reads as its tokens' positions, [1 or B, L], this rank's; None
            for their positions in their documents.
        style: the strategy.
        device: where the tensors are.

    Activation checkpointing runs forward once more in the backward pass. torch's reentrant kind
    does so inside again, wherever backward is called. For the other kind the backward pass too
    belongs inside, and torch's checkpoint raises where it is not: other tensors are kept.
    """

    def __init__(
        self,
        layout: SequenceLayout,
        axis: DeviceMesh,
        *,
        documents: Documents | None = None,
        position_ids: Tensor | None = None,
        style: AttentionStyle | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        documents = documents or Documents.single(1, layout.seq_len)
        # One row stands for all if they are alike: a model may cut the batch.
        if len(set(documents.lengths)) == 1:
            documents = Documents(documents.lengths[:1], documents.seq_len)
        super().__init__(layout, axis, documents=documents, style=style, device=device)
        if position_ids is None:
            position_ids = layout.shard(documents.position_ids(), axis.get_local_rank())
        self.position_ids = position_ids.to(device)
        self.axis, self.rows = axis, documents.batch
        self.attended = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is _LAYOUT:
            self.attended = False
            return True
        if func is _ATTENDED:
            return self.attended
        if func is _CAUSAL:
            return self._is_causal(args[0])
        if func is SWITCH_GRADIENTS and not torch.compiler.is_compiling():
            recompute_inside(self)
        if func is Tensor.backward:
            return self._backward(*args, **(kwargs or {}))
        if func is Tensor.unflatten:
            # Dynamo (2.13) cannot trace, inside a mode, the method's call of its C parent.
            return torch.unflatten(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def _backward(self, loss: Tensor, *args: Any, **how: Any) -> None:
        """A mode is off while it answers; what checkpointing recomputes must find it on."""
        with self:
            backward_unasked(loss, *args, **how)

    def _is_sharded(self, query: Tensor) -> bool:
        return not isinstance(query, DTensor) or super()._is_sharded(query)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **how: Any) -> Tensor:
        rows = query.shape[0]
        if self.rows != 1 and self.rows != rows:
            raise ValueError(
                f"A context knows the documents of its batch's rows, got {rows} rows of "
                f"queries in a context for {self.rows}: make one for each part of the batch."
            )
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            _check_recomputed()
        self.attended = True
        if isinstance(query, DTensor):
            return super()._attend(query, key, value, *args, **how)
        at = (Shard(SDPA_SEQ),)
        q, k, v = (
            DTensor.from_local(x, self.axis, at, run_check=False) for x in (query, key, value)
        )
        out = super()._attend(q, k, v, *args, **how)
        assert isinstance(out, DTensor)
        return out.to_local(grad_placements=at)

    def _is_causal(self, mask: Tensor) -> bool:
        """Compare with what a model makes of a shard's positions, by index and by their runs.

        A shard's positions jump where its stretches meet, and a model that finds documents by
        such jumps masks across them. It means no more than causal; the documents are known here.
        """
        allowed = mask if mask.dtype == torch.bool else mask == 0
        known = torch.ones_like(allowed)
        if mask.is_floating_point():
            known = allowed | (mask <= torch.finfo(mask.dtype).min)
        length = self.layout.shard_len
        if mask.ndim != 4 or mask.shape[-2:] != (length, length):
            return False
        position_ids = self.position_ids[: mask.shape[0]]
        causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        run = (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(1)
        in_runs = causal & (run[:, None, :, None] == run[:, None, None, :])  # [1 or B, 1, L, L]
        verdict = ((allowed == causal).all() | (allowed == in_runs).all()) & known.all()
        if torch.compiler.is_compiling():
            assert_in_graph(verdict, "an attention mask that is_causal does not say")
            return True
        return bool(verdict)


def _check_recomputed() -> None:
    if is_recomputed_elsewhere():
        raise ValueError(
            "Attention on shards is computed again where the context is open, got a call inside "
            "of an autograd function that is not known to open it for its backward pass: "
            "checkpoint by torch.utils.checkpoint."
        )
