"""Attention of models that know nothing of meshes: inside a context their tensors are shards.

A model that calls F.scaled_dot_product_attention on plain tensors is given a shard of every row.
Inside `local_shards` each such call attends over the whole sequence, eager or in a graph, and its
backward needs no context. A module can ask whether such a context is open, so that a module that
must not attend to its shard alone can refuse to (`ask_layout`, `ask_attended`).

Questions are ops: a mode sees ops wherever they are called, traced code included, so which
context is open needs no global variable.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from dtcp._torch.autograd import (
    SET_GRAD_ENABLED,
    is_recomputed_elsewhere,
    recompute_inside,
    run_backward,
)
from dtcp._torch.compiler import assert_in_graph
from dtcp._torch.ops import OpOverload, namespace_of, overload_of
from dtcp.distributed.dtensor_rules import SEQ
from dtcp.sdpa.arguments import SDPA_SEQ
from dtcp.sdpa.sequence_layout import sees_shard, sequence_layout
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import SequenceLayout
from dtcp.softmax.style import AttentionStyle


def _question(name: str) -> OpOverload:
    """An op that answers nothing: an open context answers True or False in its place.

    It returns a tensor since graphs hold no other results.
    """

    def no_answer(x: Tensor) -> Tensor:
        return x.new_empty(0)

    tags = (torch.Tag.cudagraph_unsafe,)
    op = torch.library.custom_op(f"dtcp::{name}", no_answer, mutates_args=(), tags=tags)
    op.register_fake(no_answer)
    return overload_of(op)


FLEX_ATTENTION = torch.ops.higher_order.flex_attention
OTHER_ATTENTION = ("torch_attn", "flash_attn", "flash_attn_2_cuda", "flash_attn_3")
"""Namespaces of torch's varlen_attn and of the flash-attn packages."""

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
        documents: of every row; None for one document per row.
        position_ids: [1 or B, L], this rank's, as the model reads them; None for each token's
            place in its document.
        style: the strategy; None for RingAttention().
        device: where the tensors are.

    Activation checkpointing runs forward once more in the backward pass. torch's reentrant kind
    recomputes inside the context again, wherever backward is called. With the other kind call
    backward inside as well: torch's checkpoint raises where it is outside, since recomputation
    then keeps other tensors than forward did. torch's fused attention of evaluation
    (torch.backends.mha) is off inside.
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
        self.fast_paths: list[bool] = []

    def __enter__(self) -> Self:
        # Traced code takes, in evaluation, torch's fused encoder layer, and no mode sees that.
        entered = super().__enter__()
        self.fast_paths.append(torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        return entered

    def __exit__(self, *raised: Any) -> None:
        torch.backends.mha.set_fastpath_enabled(self.fast_paths.pop())
        super().__exit__(*raised)

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
        if func is SET_GRAD_ENABLED and not torch.compiler.is_compiling():
            recompute_inside(self)
        if func is Tensor.backward:
            return self._backward(*args, **(kwargs or {}))
        if func is FLEX_ATTENTION:
            raise sees_shard("flex_attention")
        if namespace_of(func) in OTHER_ATTENTION:
            raise sees_shard(f"{func}")
        if func is Tensor.unflatten:
            # Dynamo (2.13) cannot trace, inside a mode, the method's call of its C parent.
            return torch.unflatten(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def _backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """A mode is off while it answers; what checkpointing recomputes must find it on."""
        with self:
            run_backward(loss, *args, **kwargs)

    def _is_sharded(self, query: Tensor, seq_dim: int = SDPA_SEQ) -> bool:
        return not isinstance(query, DTensor) or super()._is_sharded(query, seq_dim)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        rows = query.shape[0]
        if self.rows != 1 and self.rows != rows:
            raise ValueError(
                f"A context knows the documents of its batch's rows, got {rows} rows of "
                f"queries in a context for {self.rows}: make one for each part of the batch."
            )
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            _check_recomputed()
        self.attended = True
        return super()._attend(query, key, value, *args, **kwargs)

    def _check(self, query: Tensor, key: Tensor, value: Tensor, *call: Any) -> None:
        query, key, value = (self._wrap(x.detach(), SDPA_SEQ) for x in (query, key, value))
        super()._check(query, key, value, *call)

    def _carry_out(
        self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float | None
    ) -> Tensor:
        # Transposed before: a view of a DTensor has a shard that counts nobody's writes.
        shards = (self._wrap(x, SEQ) for x in (q, k, v))
        out = super()._carry_out(*shards, is_causal=is_causal, scale=scale)
        if isinstance(q, DTensor):
            return out
        return cast(DTensor, out).to_local(grad_placements=(Shard(SEQ),))

    def _wrap(self, x: Tensor, dim: int) -> Tensor:
        if isinstance(x, DTensor):
            return x
        return DTensor.from_local(x, self.axis, (Shard(dim),), run_check=False)

    def _is_causal(self, mask: Tensor) -> bool:
        """Compare a mask with those that a causal model makes of this shard.

        One is causal by index. The other is causal within runs of consecutive positions: where
        two segments of a shard meet, its positions jump, and a model that finds documents by
        such jumps masks across them. Both mean causal; the context knows the documents.
        """
        allowed = mask if mask.dtype == torch.bool else mask == 0
        allows_or_forbids = torch.ones_like(allowed)
        if mask.is_floating_point():
            allows_or_forbids = allowed | (mask <= torch.finfo(mask.dtype).min)
        length = self.layout.shard_len
        if mask.ndim != 4 or mask.shape[-2:] != (length, length):
            return False
        position_ids = self.position_ids[: mask.shape[0]]
        causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        run = (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(1)
        in_runs = causal & (run[:, None, :, None] == run[:, None, None, :])  # [1 or B, 1, L, L]
        verdict = ((allowed == causal).all() | (allowed == in_runs).all()) & allows_or_forbids.all()
        if torch.compiler.is_compiling():
            assert_in_graph(verdict, "an attention mask that is_causal does not say")
            return True
        return bool(verdict)


def _check_recomputed() -> None:
    if is_recomputed_elsewhere():
        raise ValueError(
            "Attention on shards is recomputed where its context is open, got a call inside an "
            "autograd function that is not known to open it for its backward pass: checkpoint "
            "with torch.utils.checkpoint."
        )
