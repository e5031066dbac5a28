"""The contexts of a step: how its tensors are sharded, and what else a training loop enters."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import loss_parallel

from dtcp._torch.compiler import compiled_autograd
from dtcp.sdpa.local_shards import local_shards
from dtcp.sequence.arguments import check_dim
from dtcp.sequence.layout import HeadTail
from dtcp.softmax.all_gather import AllGatherAttention
from dtcp.softmax.ring import RingAttention
from dtcp.softmax.style import AttentionStyle

Context = AbstractContextManager[Any]
ContextFactory = Callable[[], Context]
"""Opens the context of a step; called once per step."""

ROTATE_METHODS: Mapping[str, AttentionStyle] = {
    "allgather": AllGatherAttention(),
    "alltoall": RingAttention(),
}


def create_context_parallel_ctx(
    cp_mesh: DeviceMesh,
    cp_buffers: list[Tensor],
    cp_seq_dims: list[int],
    cp_no_restore_buffers: set[Tensor],
    cp_rotate_method: str | None = None,
) -> Context:
    """A context in which buffers hold this rank's tokens, head-tail, and attention spans all ranks.

    On entry each buffer's shard replaces its data; on exit it has its whole data back, which was
    never copied, unless it is among cp_no_restore_buffers.

    Args:
        cp_mesh: the 1-D axis of the sequence; None or one rank: the context does nothing.
        cp_buffers: whole, on every rank of the axis; one document per row.
        cp_seq_dims: the sequence's dim of each.
        cp_no_restore_buffers: those of the buffers, by identity, that stay sharded.
        cp_rotate_method: "allgather" gathers all keys before attending, "alltoall" passes them
            around a ring; None is the ring.
    Raises:
        ValueError: buffers that do not fit each other or the axis, or that require gradients; a
            method that is neither.
    """
    style = _style(cp_rotate_method)
    if cp_mesh is None or cp_mesh.size() == 1:
        return nullcontext()
    _check_buffers(cp_buffers, cp_seq_dims, cp_no_restore_buffers)
    layout = HeadTail(cp_buffers[0].shape[cp_seq_dims[0]], cp_mesh.size())
    mode = local_shards(layout, cp_mesh, style=style, device=cp_buffers[0].device)
    kept = {id(x) for x in cp_no_restore_buffers}
    return _ShardedBuffers(mode, list(zip(cp_buffers, cp_seq_dims, strict=True)), kept)


def get_train_context(
    enable_loss_parallel: bool, enable_compiled_autograd: bool, cp_context: Context | None = None
) -> ContextFactory:
    """Return a function that opens what a training step runs in; call it for every step.

    Args:
        enable_loss_parallel: torch's cross-entropy on logits sharded in the vocabulary.
        enable_compiled_autograd: compile the backward pass.
        cp_context: from `create_context_parallel_ctx`; entered last.
    """

    @contextmanager
    def step() -> Iterator[None]:
        with ExitStack() as stack:
            if enable_loss_parallel:
                stack.enter_context(loss_parallel())
            if enable_compiled_autograd:
                stack.enter_context(compiled_autograd())
            if cp_context is not None:
                stack.enter_context(cp_context)
            yield

    return step


class _ShardedBuffers(AbstractContextManager[None]):
    """Inside, buffers are shards and attention runs across ranks."""

    def __init__(
        self, mode: local_shards, buffers: list[tuple[Tensor, int]], kept: Collection[int]
    ) -> None:
        self.mode, self.buffers, self.kept = mode, buffers, kept
        self.whole: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> None:
        layout, rank = self.mode.layout, self.mode.axis.get_local_rank()
        for buffer, dim in self.buffers:
            # On a second entry a buffer that stays sharded is sharded already.
            if buffer.shape[dim] == layout.seq_len:
                if id(buffer) not in self.kept:
                    self.whole.append((buffer, buffer.data))
                buffer.data = layout.shard(buffer.data, rank, dim=dim)
        self.mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.mode.__exit__(*error)
        while self.whole:
            buffer, data = self.whole.pop()
            buffer.data = data


def _style(method: str | None) -> AttentionStyle:
    if method is None:
        return RingAttention()
    if method not in ROTATE_METHODS:
        raise ValueError(
            f"Ranks exchange keys by one of {list(ROTATE_METHODS)}, got "
            f"cp_rotate_method={method!r}: use one, or None."
        )
    return ROTATE_METHODS[method]


def _check_buffers(
    buffers: Sequence[Tensor], dims: Sequence[int], kept: Collection[Tensor]
) -> None:
    for name, value in (("cp_buffers", buffers), ("cp_seq_dims", dims)):
        if not isinstance(value, Sequence):
            raise TypeError(
                f"A context shards a list of buffers, each in one dim, got {name} of type "
                f"{type(value).__name__}: give a list."
            )
    if not isinstance(kept, Collection):
        raise TypeError(
            f"Buffers that stay sharded are a set of tensors, got cp_no_restore_buffers={kept!r}: "
            f"give set() for none."
        )
    if not buffers or len(buffers) != len(dims):
        raise ValueError(
            f"Every buffer has a sequence dim, got {len(buffers)} buffers and {len(dims)} dims: "
            f"give one dim per buffer, and at least one buffer."
        )
    for x, dim in zip(buffers, dims, strict=True):
        check_dim("A context", x, dim)
    lengths = [x.shape[dim] for x, dim in zip(buffers, dims, strict=True)]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"Buffers are sharded alike, got lengths={lengths} at dims={list(dims)}: pad them to "
            f"one length, or name the sequence's dims."
        )
    known = {id(x) for x in buffers}
    if any(id(x) not in known for x in kept):
        raise ValueError(
            f"Buffers that stay sharded are among the buffers, got {len(kept)} of which some are "
            f"not: pass the same tensors in both."
        )
    if any(x.requires_grad for x in buffers):
        raise ValueError(
            "Buffers are sharded in place, which gradients do not follow, got one that requires "
            "grad: give it to make_cp_batch_and_ctx, or shard it by relayout.shard."
        )
