"""Run one step of a model on tensors without memory, for one rank of a mesh."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dtcp._torch import fake_tensors
from dtcp.batch import ShardedBatch
from dtcp.distributed.groups import axis_group_name, group_name
from dtcp.distributed.mesh import ParallelMesh
from dtcp.mixer import ClaimedMixer
from dtcp.parallelize import ParallelPlan, parallelize
from dtcp.parallelize.tied_parameters import find_tied_parameters, restore_tied_parameters
from dtcp.planner.blocks import BlockKind, keep_one_of_each
from dtcp.planner.setup import Setup
from dtcp.planner.sharded_weights import Unit, units_of
from dtcp.planner.stand_in_loss import stand_in_loss
from dtcp.planner.subject import Subject
from dtcp.planner.trace import Place, StepRecorder, Trace, follow_blocks
from dtcp.style import MixerStyle


@dataclass(frozen=True)
class TracedStep:
    """A step of one rank: what ran once for each kind of block, and what is known of the rest."""

    trace: Trace
    kinds: list[BlockKind]
    units: list[Unit]
    model: nn.Module
    sharded: ShardedBatch
    inputs: int
    """Bytes of the batch."""
    axes: dict[str, str]
    """Axis of each process group, by name."""
    groups: list[str]
    """Names of the groups that mixers talk over, as this rank has them."""

    def times(self, part: str) -> int:
        """How many blocks a part stands for."""
        return next((kind.count for kind in self.kinds if kind.name == part), 1)


def trace_step(subject: Subject, mesh: ParallelMesh, setup: Setup) -> TracedStep:
    """Build the model, one block of a kind, apply its plan, run a step, and note it.

    The process group of the mesh is there, fake or real; nothing is sent.

    Raises:
        ValueError: a mesh, layout or strategy that does not suit the model.
    """
    precision = setup.precision
    with torch.device("meta"), _default_dtype(precision.compute):
        model = subject.build()
    plan = subject.plan(model, mesh, setup.attention, setup.layout)
    kinds, plan = keep_one_of_each(model, plan)
    _keep_wide(model, plan, precision.master)
    # Weights stay whole: what sharding them would do is arithmetic.
    whole = replace(mesh, hsdp=None)
    parallelize(model, whole, plan, activation_checkpoint=setup.checkpoint)
    _check_stated(model)
    counts = {kind.name: kind.count for kind in kinds}

    fake = fake_tensors()
    tied = find_tied_parameters(model)
    with fake:
        model.to_empty(device="cpu")
    # It makes two tensors of a shared parameter.
    restore_tied_parameters(model, tied)
    local, sharded = subject.batch(model, mesh, setup.layout, setup.documents)
    inputs = sum(x.numel() * x.element_size() for x in local.values())
    with fake:
        local = {key: fake.from_tensor(x) for key, x in local.items()}
    names = [kind.name for kind in kinds]
    if mesh.tp is not None:
        # The first time, DTensor tries each op on whole tensors, to know its result's shape.
        _run(subject, model, local, sharded, names, fake)
    trace, reached = _run(subject, model, local, sharded, names, fake)
    units = [
        replace(unit, count=counts.get(unit.part, 1))
        for unit in units_of(model, plan, precision, reached, reshard=setup.reshard)
    ]
    groups = [group_name(mesh.cp)] if mesh.cp is not None else []
    for style in styles_of(model):
        groups += style.groups(mesh.cp)
    return TracedStep(trace, kinds, units, model, sharded, inputs, axes_of(mesh), groups)


def styles_of(model: nn.Module) -> list[Any]:
    """The styles of a model's mixers, each once."""
    styles = [module.style for module in model.modules() if isinstance(module, ClaimedMixer)]
    return list({id(style): style for style in styles}.values())


def _run(
    subject: Subject,
    model: nn.Module,
    local: dict[str, Tensor],
    sharded: ShardedBatch,
    names: Sequence[str],
    fake: AbstractContextManager[Any],
) -> tuple[Trace, set[int]]:
    """What a step does, and the ids of the parameters that get a gradient."""
    model.train()
    reached: set[int] = set()

    def done(p: Tensor) -> None:
        reached.add(id(p))
        _drop_grad(p)

    recorder = StepRecorder(sharded.attn_metadata)
    recorder.ignore([*model.parameters(), *model.buffers(), *local.values()])
    blocks = {name: model.get_submodule(name) for name in names}
    with ExitStack() as stack:
        for p in (p for p in model.parameters() if p.requires_grad):
            # FSDP takes a block's gradients away once they are summed.
            stack.callback(p.register_post_accumulate_grad_hook(done).remove)
        for hook in follow_blocks(lambda: recorder, blocks):
            stack.callback(hook.remove)
        stack.enter_context(fake)
        stack.enter_context(recorder)
        losses = [stand_in_loss(x) for x in subject.logits(model, local, sharded)]
        loss = torch.stack(losses).sum()
        del losses
        recorder.enter(Place(backward=True))
        loss.backward()
    return recorder.close(), reached


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
    if mesh.hsdp is not None and mesh.hsdp.ndim == 2:
        axes |= {axis_group_name(mesh.hsdp, index): "fsdp" for index in range(2)}
    return axes


def _keep_wide(model: nn.Module, plan: ParallelPlan, dtype: torch.dtype) -> None:
    """What mixed precision leaves alone, in its own dtype."""
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


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
