"""What a run is expected to move and hold, and whether it does."""

from dataclasses import dataclass, replace
from typing import Any

from dtcp.torchtitan.hf_model import HuggingFaceConfig, read_config
from dtcp.torchtitan.parallelize import checkpoint_of

import torch

from dtcp.distributed.groups import rank_of_process
from dtcp.distributed.mesh import Degrees, ParallelMesh
from dtcp.metadata import BatchMetadata
from dtcp.parallelize import ActivationCheckpoint
from dtcp.parallelize.plans.families import FAMILIES
from dtcp.planner.captured_warnings import captured_warnings
from dtcp.planner.forecast import received_over_cp, torch_bytes
from dtcp.planner.peak import PeakMemory, peak_memory
from dtcp.planner.setup import Precision, Setup
from dtcp.planner.step import TracedStep, trace_step
from dtcp.planner.subject import FamilyModel, HuggingFaceModel, Subject
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import SequenceLayout
from dtcp.softmax.default import device_type_of
from dtcp.softmax.style import AttentionStyle

MIB, GIB = 2**20, 2**30
NEAR = 0.01
"""By what share counted bytes may differ from expected ones before a run warns."""


@dataclass(frozen=True)
class Expectation:
    """A traced step of this rank, evaluated again for every batch.

    Args:
        memory: at the fullest moment, eager.
    """

    step: TracedStep
    setup: Setup
    memory: PeakMemory

    def received(self, metadata: BatchMetadata) -> int:
        """Bytes over cp for one micro-batch, forward and backward, from what the host knows."""
        return received_over_cp(self.step, metadata)

    def lines(self) -> str:
        """What a run prints at its start about a step."""
        parts, by_axis = self.setup.micro_batches, torch_bytes(self.step, self.setup)
        over_cp = parts * self.received(self.step.sharded.attn_metadata)
        received = {"cp (rows of one document)": over_cp}
        received |= {axis: by_axis[axis].total for axis in ("fsdp", "tp") if axis in by_axis}
        moved = ", ".join(f"{size / MIB:.1f} MiB for {axis}" for axis, size in received.items())
        return (
            f"expected    rank {rank_of_process()} receives {moved} per step; "
            f"{self.memory.total / GIB:.2f} GiB of tensors at most (eager), in {self.memory.where}"
        )


def kept_by_blocks(config: Any) -> ActivationCheckpoint:
    """What blocks keep for backward, as the config has it."""
    return checkpoint_of(config.activation_checkpoint)


def subject_of(config: Any) -> Subject:
    """The model of a config, as the planner builds it.

    Raises:
        ValueError: a model of torchtitan's.
    """
    spec = config.model_spec
    if isinstance(spec.model, HuggingFaceConfig):
        return HuggingFaceModel(spec.name, read_config(spec.model.source))
    shape = getattr(spec.model, "shape", None)
    if shape is None or spec.name not in FAMILIES:
        raise ValueError(
            f"The planner builds models of dtcp's and of transformers, got torchtitan's "
            f"{spec.name}: leave out --dtcp.forecast, name a --dtcp.strategy and a --dtcp.layout, "
            f"or pass its config.json as --model.hf."
        )
    return FamilyModel(spec.flavor, spec.name, shape)


def setup_of(
    config: Any,
    degrees: Degrees,
    documents: Documents,
    layout: type[SequenceLayout],
    attention: AttentionStyle,
) -> Setup:
    """How the config runs its model on a mesh, with these rows, this layout and this strategy."""
    return Setup(
        degrees,
        documents,
        layout=layout,
        attention=attention,
        checkpoint=kept_by_blocks(config),
        precision=precision_of(config.training),
        reshard=config.parallelism.fsdp_reshard_after_forward != "never",
    )


def precision_of(training: Any) -> Precision:
    """The dtypes of torchtitan's training section."""
    return Precision(
        getattr(torch, training.mixed_precision_param),
        getattr(torch, training.mixed_precision_reduce),
        getattr(torch, training.dtype),
    )


def expectation(config: Any, mesh: ParallelMesh, micro_batches: int = 1) -> Expectation:
    """Trace a step of the config's model on the mesh of this run; all ranks call it.

    Args:
        micro_batches: of a step.
    Raises:
        ValueError: a model of torchtitan's.
    """
    training, section = config.training, config.dtcp
    rows = Documents.single(training.local_batch_size, training.seq_len)
    style = section.attention_style(device_type_of(mesh.cp))
    setup = setup_of(config, mesh.degrees, rows, section.sequence_layout(), style)
    setup = replace(setup, micro_batches=micro_batches)
    with captured_warnings():  # the run's own plan has printed them
        step = trace_step(subject_of(config), mesh, setup)
    return Expectation(step, setup, peak_memory(step, setup))


def warning(counted: float, expected: float) -> str:
    """A warning where more or less was counted than expected; empty where it is close."""
    if abs(counted - expected) <= NEAR * expected:
        return ""
    return (
        f"warning: The bytes of a step are those that its plan adds up to, got {counted:,.0f} "
        f"received for cp where {expected:,.0f} were expected: a mixer moves what its style does "
        f"not say, or recomputes what it was thought to keep."
    )
