"""Run one step of a model on tensors without memory, for one rank of a mesh."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from dtcp._torch.fakes import SizingTrials, fake_tensors, noted_trials
from dtcp._torch.tensors import storage_key
from dtcp.distributed.groups import axis_group_name, group_name
from dtcp.distributed.mesh import ParallelMesh
from dtcp.metadata import BatchMetadata
from dtcp.mixer import ClaimedMixer
from dtcp.models.moe import Experts
from dtcp.parallelize import ParallelPlan, parallelize
from dtcp.parallelize.tensor_parallel import is_experts
from dtcp.parallelize.tied_parameters import find_tied_parameters, restore_tied_parameters
from dtcp.planner.blocks import BlockKind, keep_one_of_each
from dtcp.planner.setup import Setup
from dtcp.planner.sharded_weights import Unit, UnitRole, modules_of_units, units_of
from dtcp.planner.stand_in_loss import stand_in_loss
from dtcp.planner.subject import Subject
from dtcp.planner.trace import OUTSIDE, Place, StepRecorder, Trace, follow_blocks
from dtcp.sharded_batch import ShardedBatch
from dtcp.style import MixerStyle
from dtcp.token_dropout import leave_out_dropout


@dataclass(frozen=True)
class StepNumbers:
    """A step of one rank in numbers: each kind of block ran once, and is counted as it repeats."""

    trace: Trace
    kinds: list[BlockKind]
    units: list[Unit]
    inputs: int
    """Bytes of the batch, of what its mixers read of it, and of the model's buffers."""
    parameters: int
    """Of the whole model, of all its blocks."""
    axes: dict[str, str]
    """Axis of each process group, by name."""

    def times(self, part: str) -> int:
        """How many blocks a part stands for."""
        return next((kind.count for kind in self.kinds if kind.name == part), 1)


@dataclass(frozen=True)
class TracedStep(StepNumbers):
    """A step of one rank with the model that took it, to be asked of other ranks' batches."""

    model: nn.Module
    sharded: ShardedBatch
    groups: list[str]
    """Names of the groups that mixers talk over, as this rank has them."""

    def numbers(self) -> StepNumbers:
        """The numbers alone, without what is large: the model, and the calls of its ops."""
        return StepNumbers(
            replace(self.trace, calls=[]),
            self.kinds,
            units=self.units,
            inputs=self.inputs,
            parameters=self.parameters,
            axes=self.axes,
        )


@dataclass(frozen=True)
class PlacedModel:
    """A model with one block of a kind and its plan applied, on the meta device."""

    model: nn.Module
    plan: ParallelPlan
    kinds: list[BlockKind]

    def units(
        self, setup: Setup, experts: DeviceMesh | None, trained: Collection[int] | None = None
    ) -> list[Unit]:
        """What FSDP gathers together.

        Args:
            experts: the axes that weights of experts are spread over.
            trained: ids of the parameters that get a gradient; None for all that want one.
        """
        if trained is None:
            trained = {id(p) for p in self.model.parameters() if p.requires_grad}
        counts = {kind.name: kind.count for kind in self.kinds}
        units = units_of(
            self.model, self.plan, setup.precision, trained, experts=experts, reshard=setup.reshard
        )
        return [replace(unit, count=counts.get(unit.part, 1)) for unit in units]


def place_model(subject: Subject, mesh: ParallelMesh, setup: Setup) -> PlacedModel:
    """Build the model, one block of a kind, and apply its plan; no memory, and no step yet.

    Raises:
        ValueError: a mesh, layout or strategy that does not suit the model.
    """
    precision = setup.precision
    with torch.device("meta"), _default_dtype(precision.compute), _Undrawn():
        model = subject.build()
    plan = subject.plan(model, mesh, setup.attention, setup.layout)
    kinds, plan = keep_one_of_each(model, plan)
    _keep_wide(model, plan, precision.master)
    # Weights stay whole: what sharding them would do is arithmetic.
    whole = replace(mesh, hsdp=None)
    parallelize(model, whole, plan, activation_checkpoint=setup.checkpoint)
    _check_stated(model)
    return PlacedModel(model, plan, kinds)


def trace_step(subject: Subject, mesh: ParallelMesh, setup: Setup) -> TracedStep:
    """Place the model, run a step, and record it.

    The process group of the mesh exists, fake or real; nothing is sent.

    Raises:
        ValueError: a mesh, layout or strategy that does not suit the model.
    """
    placed = place_model(subject, mesh, setup)
    model, kinds = placed.model, placed.kinds
    fake = fake_tensors()
    tied = find_tied_parameters(model)
    with fake:
        model.to_empty(device="cpu")
    # to_empty makes two tensors of a shared parameter.
    restore_tied_parameters(model, tied)
    local, sharded = subject.batch(model, mesh, setup.layout, setup.documents)
    read = metadata_tensors(sharded.attn_metadata)
    inputs = _bytes_of([*local.values(), *read, *placed.model.buffers()])
    with fake:
        local = {key: fake.from_tensor(x) for key, x in local.items()}
    names = [kind.name for kind in kinds]
    trace, reached = _run(subject, model, placed.plan, local, sharded, names, fake)
    groups = [group_name(mesh.cp)] if mesh.cp is not None else []
    for style in styles_of(model):
        groups += style.groups(mesh.cp)
    return TracedStep(
        trace,
        kinds,
        units=placed.units(setup, mesh.experts, reached),
        inputs=inputs,
        parameters=_whole(model, kinds),
        axes=axes_of(mesh),
        model=model,
        sharded=sharded,
        groups=groups,
    )


def _whole(model: nn.Module, kinds: Sequence[BlockKind]) -> int:
    """Parameters of the whole model, of all its blocks."""
    parts = {kind.name: kind.count for kind in kinds}
    total = 0
    for name, p in model.named_parameters():
        part = next((part for part in parts if name.startswith(f"{part}.")), "")
        total += p.numel() * parts.get(part, 1)
    return total


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors' memory, each piece counted once."""
    storages = [x.untyped_storage() for x in tensors]
    return sum({storage_key(each): each.nbytes() for each in storages}.values())


def metadata_tensors(metadata: BatchMetadata) -> list[Tensor]:
    """The tensors that mixers read of a batch."""
    return [tensor for key in metadata for tensor in metadata[key].tensors()]


def styles_of(model: nn.Module) -> list[Any]:
    """The styles of a model's mixers, each once."""
    styles = [module.style for module in model.modules() if isinstance(module, ClaimedMixer)]
    return list({id(style): style for style in styles}.values())


def _run(
    subject: Subject,
    model: nn.Module,
    plan: ParallelPlan,
    local: dict[str, Tensor],
    sharded: ShardedBatch,
    names: Sequence[str],
    fake: AbstractContextManager[Any],
) -> tuple[Trace, set[int]]:
    """What a step does, and the ids of the parameters that get a gradient."""
    model.train()
    leave_out_dropout(model)  # it reads a key for each token, and these tokens are fake
    trials = SizingTrials()
    recorder = StepRecorder(sharded.attn_metadata, fake=True, trials=trials)
    recorder.ignore([*model.parameters(), *model.buffers(), *local.values()])
    gradients = _Gradients(recorder, model, plan)
    blocks = {name: model.get_submodule(name) for name in names}

    with ExitStack() as stack:
        for experts in experts_of(model):
            hook = experts.register_forward_pre_hook(recorder.routes.before_experts)
            stack.callback(hook.remove)
        for p in (p for p in model.parameters() if p.requires_grad):
            stack.callback(p.register_post_accumulate_grad_hook(gradients.note).remove)
        for hook in follow_blocks(lambda: recorder, blocks, gradients.leave):
            stack.callback(hook.remove)
        stack.enter_context(noted_trials(trials))
        stack.enter_context(fake)
        stack.enter_context(recorder)
        logits = subject.logits(model, local, sharded)
        recorder.enter(Place())
        for x in logits:
            x.register_hook(lambda _: recorder.enter(Place(backward=True)))
        losses = [stand_in_loss(x) for x in logits]
        loss = torch.stack(losses).sum()
        del logits, x, losses
        recorder.enter(Place(backward=True))
        loss.backward()
        trace = recorder.close()
        gradients.leave()
    return trace, gradients.reached


def experts_of(model: nn.Module) -> list[nn.Module]:
    """The modules of experts, called with tokens and with what each has chosen, [N, k]."""
    return [m for m in model.modules() if isinstance(m, Experts) or is_experts(m)]


class _Gradients:
    """Whole gradients of weights, dropped when FSDP would take them: once a unit is done."""

    def __init__(self, recorder: StepRecorder, model: nn.Module, plan: ParallelPlan) -> None:
        self.recorder, self.reached = recorder, set[int]()
        self._held: dict[str, list[Tensor]] = {}
        self._part: dict[int, str] = {}
        for part, role, modules in modules_of_units(model, plan):
            # What is used before the blocks, and the root, are done at the end of the pass.
            name = part or (OUTSIDE if role is UnitRole.LAST else "")
            for p in (p for module in modules for p in module.parameters()):
                self._part.setdefault(id(p), name)

    def note(self, p: Tensor) -> None:
        """A gradient is there."""
        self.reached.add(id(p))
        grad = p.grad
        assert grad is not None
        self.recorder.count_gradient(grad.to_local() if isinstance(grad, DTensor) else grad)
        self._held.setdefault(self._part[id(p)], []).append(p)

    def leave(self, part: str | None = None) -> None:
        """The backward pass of a part is over; None: of all."""
        for name in [*self._held] if part is None else [part]:
            for p in self._held.pop(name, []):
                _drop_grad(p)


def _check_stated(model: nn.Module) -> None:
    """Refuse mixers whose style does not say what it moves."""
    for name, module in model.named_modules():
        style = getattr(module, "style", None)
        if isinstance(module, ClaimedMixer) and getattr(type(style), "moves", None) in (
            None,
            MixerStyle.moves,
        ):
            raise ValueError(
                f"A plan adds up what every mixer moves, got {name!r}, a {type(module).__name__} "
                f"whose {type(style).__name__} has no moves(): write it (docs/write_a_mixer.md)."
            )


def axes_of(mesh: ParallelMesh) -> dict[str, str]:
    """The axis that torch's collectives on each of a mesh's process groups stand for.

    One group may serve several axes; over cp, it is our ops that communicate.
    """
    views = {"loss": mesh.loss, "cp": mesh.cp, "tp": mesh.tp, "fsdp": mesh.fsdp}
    axes = {axis_group_name(view, 0): name for name, view in views.items() if view is not None}
    for name, weights in {"edp": mesh.expert_hsdp, "fsdp": mesh.hsdp}.items():
        if weights is not None and (weights.ndim == 2 or name == "edp"):
            axes[axis_group_name(weights, weights.ndim - 1)] = name
        if weights is not None and weights.ndim == 2:
            axes[axis_group_name(weights, 0)] = "dp_replicate"
    return axes


def _keep_wide(model: nn.Module, plan: ParallelPlan, dtype: torch.dtype) -> None:
    """Keep what mixed precision leaves alone in its own dtype."""
    for name in plan.keep_dtype:
        parent, _, last = name.rpartition(".")
        old = model.get_parameter(name)
        setattr(model.get_submodule(parent), last, nn.Parameter(old.detach().to(dtype)))


def _drop_grad(p: Tensor) -> None:
    grad = p.grad
    if isinstance(grad, DTensor) and isinstance(p, DTensor) and grad.placements != p.placements:
        # As FSDP does before it sums over its own axis.
        grad.redistribute(placements=p.placements)
    p.grad = None


class _Undrawn(TorchFunctionMode):
    """Inside, weights are not drawn: on the meta device that takes time and changes nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


_DRAWS = frozenset(
    [
        *(Tensor.normal_, Tensor.uniform_),
        *(nn.init.normal_, nn.init.uniform_, nn.init.trunc_normal_, nn.init.kaiming_uniform_),
    ]
)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
