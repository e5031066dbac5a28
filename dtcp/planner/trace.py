"""What one step of a model does, recorded while it runs on tensors that have sizes and no memory.

A mode stands above fake tensors and sees every op: what our ops move (their `moves`), the
collectives of torch, matmuls, and every tensor that is made and let go. Stretches of the step are
named by the block that they belong to, so that one block of a kind can stand for all of them.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import flop_registry

from dtcp._torch.fakes import SizingTrials, real_tensors
from dtcp._torch.ops import OpOverload, TorchDispatchMode, packet_of
from dtcp._torch.tensors import flat_leaves, put_back, storage_key
from dtcp.distributed.dtensor_rules import bind
from dtcp.distributed.groups import group_of
from dtcp.distributed.ops import moves_of
from dtcp.metadata import BatchMetadata, MetadataKey
from dtcp.planner.even_routes import ROUTE, EvenRoutes
from dtcp.planner.mixer_flops import GROUPED_PRODUCTS, mixer_flops

OUTSIDE = "what lies outside of blocks"


@dataclass(frozen=True)
class Place:
    """Where in a step something happens."""

    part: str = OUTSIDE
    backward: bool = False


@dataclass(frozen=True)
class Size:
    """A tensor without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class MetadataTensor:
    """One of the tensors of a batch's metadata."""

    key: MetadataKey
    index: int


@dataclass(frozen=True)
class OpCall:
    """One call of an op of ours, which can be evaluated for another batch or rank."""

    place: Place
    op: OpOverload
    spec: Any
    leaves: tuple[Any, ...]

    def arguments(
        self, metadata: Mapping[MetadataKey, Sequence[Tensor]], groups: Mapping[str, str]
    ) -> tuple[Any, Any]:
        """(args, kwargs) with a batch's metadata and a rank's groups for those of the trace."""
        leaves = []
        for leaf in self.leaves:
            if isinstance(leaf, MetadataTensor):
                leaf = metadata[leaf.key][leaf.index]
            elif isinstance(leaf, str):
                leaf = groups.get(leaf, leaf)
            elif isinstance(leaf, Size):
                leaf = torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
            leaves.append(leaf)
        args, kwargs = put_back(leaves, self.spec)
        return args, kwargs

    @property
    def group(self) -> str | None:
        """The name of the one process group that it was given; None where it takes none or more."""
        args, kwargs = put_back(list(self.leaves), self.spec)
        return bind(self.op, args, kwargs).get("group")


@dataclass
class Stretch:
    """Bytes alive in a stretch of the step, without gradients of weights.

    Args:
        start, end: when it began, and when it ended.
        peak: at the moment when they and the gradients together were most.
        grads, grads_left: whole gradients of weights, at that moment and at the end.
    """

    place: Place
    start: int
    peak: int
    end: int
    grads: int = 0
    grads_left: int = 0


@dataclass
class Trace:
    """What a step did."""

    calls: list[OpCall] = field(default_factory=list)
    collectives: dict[tuple[Place, str], int] = field(default_factory=lambda: defaultdict(int))
    """Bytes received in torch's collectives, by place and name of the process group."""
    flops: dict[Place, int] = field(default_factory=lambda: defaultdict(int))
    """Of matmuls, those of experts among them; those of mixers depend on the batch."""
    stretches: list[Stretch] = field(default_factory=list)


class StepRecorder(TorchDispatchMode):
    """Records a step. Enter it above the mode of fake tensors, or around real ones.

    Args:
        metadata: of the batch that is run; its tensors are recognized in the calls.
        fake: tensors have no data, so every expert gets equally many tokens.
        trials: true while DTensor tries an op on whole tensors, which a rank never has.
    """

    def __init__(
        self,
        metadata: BatchMetadata,
        *,
        fake: bool = False,
        trials: SizingTrials | None = None,
    ) -> None:
        super().__init__()
        self.trials = trials
        self.trace, self.place, self.live = Trace(), Place(), 0
        self.fake, self.routes = fake, EvenRoutes()
        self.grads = 0
        """Bytes of whole gradients of weights."""
        self._alive: dict[int, int] = {}
        self._of_weights: dict[int, int] = {}
        self._of_batch = {
            id(tensor): MetadataTensor(key, index)
            for key in metadata
            for index, tensor in enumerate(metadata[key].tensors())
        }
        self._open(Place())

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these as alive: weights, and the batch."""
        for x in tensors:
            local = x.to_local() if isinstance(x, DTensor) else x
            self._alive[storage_key(local.untyped_storage())] = 0

    def count_gradient(self, grad: Tensor) -> None:
        """Count this tensor's memory apart: it is a weight's gradient."""
        key = storage_key(grad.untyped_storage())
        if size := self._alive.pop(key, 0):
            self.live -= size
            self._of_weights[key] = size
            self.grads += size

    def enter(self, place: Place) -> None:
        """What follows belongs there."""
        self.close()
        self._open(place)

    def close(self) -> Trace:
        """The whole step."""
        stretch = self.trace.stretches[-1]
        stretch.end, stretch.grads_left = self.live, self.grads
        return self.trace

    def _open(self, place: Place) -> None:
        self.place = place
        self.trace.stretches.append(
            Stretch(place, self.live, self.live, self.live, self.grads, self.grads)
        )

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled below; a wrapper around each op costs as much as a small op (2.13).
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and hasattr(args[0], "fake_device"):
            # Asked more often than all ops are called; what fake tensors' mode would answer.
            x = args[0]
            return torch.device("meta") if x.fake_mode.in_kernel_invocation else x.fake_device
        if any(issubclass(kind, DTensor) for kind in types):
            # What it does is dispatched again, on local tensors.
            return NotImplemented
        if self.trials:
            return func(*args, **(kwargs or {}))
        kwargs, name = kwargs or {}, func.name()
        if self.fake and name == ROUTE:
            out = self.routes(func, args, kwargs)
        elif self.fake and name == "aten::detach" and type(args[0]) is Tensor:
            # Checkpointing detaches what it keeps: what the host reads stays readable.
            with real_tensors():
                out = func(*args)
        else:
            out = func(*args, **kwargs)
        if name in GROUPED_PRODUCTS:
            self.trace.flops[self.place] += mixer_flops(func, args)
        elif name.startswith("dtcp::"):
            self._note_call(func, args, kwargs)
        elif name.startswith(("_c10d_functional::", "c10d::")):
            group, size = _collective_bytes(func, args, kwargs)
            self.trace.collectives[self.place, group] += size
        elif (count := flop_registry.get(packet_of(func))) is not None:
            self.trace.flops[self.place] += count(*args, **kwargs, out_val=out)
        self._weigh(out)
        return out

    def _note_call(self, func: OpOverload, args: Any, kwargs: Any) -> None:
        leaves, spec = flat_leaves((args, kwargs))
        # Before sizes stand for them: what is held inside, on top of what is alive.
        if (moves := moves_of(func)) is not None:
            with real_tensors():
                self._rise(moves(*args, **kwargs).workspace)
        kept = tuple(self._kept(leaf) for leaf in leaves)
        self.trace.calls.append(OpCall(self.place, func, spec, kept))

    def _kept(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in self._of_batch:
            return self._of_batch[id(leaf)]
        if self.fake and type(leaf) is Tensor:
            # What the host reads beside a batch's metadata: how many tokens go to experts.
            return leaf
        return Size(tuple(leaf.shape), leaf.dtype)

    def _weigh(self, out: Any) -> None:
        for x in flat_leaves(out)[0]:
            if not isinstance(x, Tensor):
                continue
            storage = x.untyped_storage()
            key, size = storage_key(storage), storage.nbytes()
            if key not in self._alive and key not in self._of_weights and size:
                self._alive[key] = size
                self.live += size
                weakref.finalize(storage, self._let_go, key)
        self._rise(0)

    def _rise(self, above: int) -> None:
        stretch = self.trace.stretches[-1]
        if self.live + above + self.grads > stretch.peak + stretch.grads:
            stretch.peak, stretch.grads = self.live + above, self.grads

    def _let_go(self, key: int) -> None:
        self.live -= self._alive.pop(key, 0)
        self.grads -= self._of_weights.pop(key, 0)


def _collective_bytes(func: OpOverload, args: Any, kwargs: Any) -> tuple[str, int]:
    """(name of the group, bytes that a rank receives) of one of torch's collectives.

    All-gather: the others' parts. Reduce-scatter: the others' summands of the own part. All-reduce:
    both, one after the other. Waiting and the like moves nothing.
    """
    name = func.name().partition("::")[2]
    group = _group_of(bind(func, args, kwargs))
    if group is None:
        return "", 0
    n = dist.get_world_size(group_of(group))
    tensors = [x for x in flat_leaves(args)[0] if isinstance(x, Tensor)]
    sizes = [x.nbytes for x in tensors]
    if "all_reduce" in name or "allreduce" in name:
        return group, 2 * (n - 1) * sum(sizes) // n
    if "reduce_scatter" in name:
        whole = max(sizes)
        return group, whole // n * (n - 1)
    if "all_gather" in name or "allgather" in name:
        # A call that names its output lists it beside its input.
        return group, (n - 1) * min(sizes)
    if "all_to_all" in name or "alltoall" in name:
        return group, max(sizes) // n * (n - 1)
    return group, 0


def _group_of(bound: Mapping[str, Any]) -> str | None:
    group = bound.get("group_name", bound.get("process_group"))
    if isinstance(group, str):
        return group
    if group is None:
        return None
    boxed = dist.ProcessGroup.unbox(group) if not isinstance(group, dist.ProcessGroup) else group
    return boxed.group_name


def follow_blocks(
    recorder: Callable[[], StepRecorder],
    blocks: Mapping[str, nn.Module],
    leave: Callable[[str], None],
) -> list[Any]:
    """Tell the recorder when a block's forward and backward begin. Returns hooks to remove.

    Args:
        leave: called with the part that the backward pass leaves, before another begins.
    """
    followed: set[int] = set()
    hooks = []

    def before(name: str, args: Any) -> None:
        x = _first(args)
        if x is not None and x.requires_grad and id(x) not in followed:
            x.register_hook(lambda _: go_on(Place(backward=True)))
        recorder().enter(Place(name))

    def after(name: str, out: Any) -> None:
        recorder().enter(Place())
        x = _first(out)
        if x is not None and x.requires_grad:
            followed.add(id(x))
            x.register_hook(lambda _: go_on(Place(name, backward=True)))

    def go_on(place: Place) -> None:
        leave(recorder().place.part)
        recorder().enter(place)

    for name, block in blocks.items():
        hooks.append(block.register_forward_pre_hook(lambda _, args, name=name: before(name, args)))
        hooks.append(block.register_forward_hook(lambda _, args, out, name=name: after(name, out)))
    return hooks


def _first(x: Any) -> Tensor | None:
    """The stream, among what a block is called with or returns."""
    return next(
        (
            leaf
            for leaf in flat_leaves(x)[0]
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ),
        None,
    )
