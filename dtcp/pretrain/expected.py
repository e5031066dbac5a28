"""What a run is expected to move and hold, and whether it does."""

from dataclasses import dataclass
from typing import Any

from dtcp.torchtitan.parallelize import checkpoint_of

import torch

from dtcp.distributed.mesh import ParallelMesh
from dtcp.metadata import BatchMetadata
from dtcp.parallelize import ActivationCheckpoint
from dtcp.planner.forecast import received_over_cp
from dtcp.planner.peak import PeakMemory, peak_memory
from dtcp.planner.setup import Precision, Setup
from dtcp.planner.step import TracedStep, trace_step
from dtcp.planner.subject import FAMILIES, FamilyModel
from dtcp.sequence.documents import Documents

NEAR = 0.01
"""How far counted bytes may be from expected ones, as a share, before a run says so."""


@dataclass(frozen=True)
class Expectation:
    """A traced step of this rank, asked again for every batch.

    Args:
        memory: of the fullest moment, eager.
    """

    step: TracedStep
    memory: PeakMemory

    def received(self, metadata: BatchMetadata) -> int:
        """Bytes over cp for one micro-batch, forward and backward: read off the host's tables."""
        return received_over_cp(self.step, metadata)

    def lines(self) -> str:
        """What the start of a run says, for rows of one document each."""
        received = self.received(self.step.sharded.attn_metadata)
        gib = 2**30
        return (
            f"expected    rank 0 receives {received / 2**20:.1f} MiB for cp a micro-batch of rows "
            f"of one document; {self.memory.total / gib:.2f} GiB at most (eager), in "
            f"{self.memory.where}"
        )


def kept_by_blocks(config: Any) -> ActivationCheckpoint:
    """What blocks keep for backward, as the config has it."""
    return checkpoint_of(config.activation_checkpoint)


def expectation(config: Any, mesh: ParallelMesh) -> Expectation:
    """Trace a step of the config's model on the mesh of this run; all ranks call it.

    Raises:
        ValueError: a model that is no family's of dtcp.
    """
    shape = getattr(config.model_spec.model, "shape", None)
    if shape is None or config.model_spec.name not in FAMILIES:
        raise ValueError(
            f"A forecast is of a model of dtcp's, got {config.model_spec.name}: leave out "
            f"--dtcp.forecast."
        )
    training = config.training
    setup = Setup(
        mesh.degrees,
        Documents.single(training.local_batch_size, training.seq_len),
        config.dtcp.sequence_layout(),
        config.dtcp.attention_style(),
        kept_by_blocks(config),
        Precision(
            getattr(torch, training.mixed_precision_param),
            getattr(torch, training.mixed_precision_reduce),
            getattr(torch, training.dtype),
        ),
        reshard=config.parallelism.fsdp_reshard_after_forward != "never",
    )
    subject = FamilyModel(config.model_spec.flavor, config.model_spec.name, shape)
    step = trace_step(subject, mesh, setup)
    return Expectation(step, peak_memory(step, setup))


def warning(counted: float, expected: float) -> str:
    """What is wrong where more or less was counted than expected; nothing where it is near."""
    if abs(counted - expected) <= NEAR * expected:
        return ""
    return (
        f"warning: The bytes of a step are those that its plan adds up to, got {counted:,.0f} "
        f"received for cp where {expected:,.0f} were expected: a mixer moves what its style does "
        f"not say, or recomputes what it was thought to keep."
    )
