"""Does a step hold at most what the planner forecasts? One rank of eight, on one card.

The real model with its real FSDP, strategies and optimizer, few layers of it, on a process group
where nobody answers: what is allocated is what a rank of eight allocates.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.problems import Case
from benchmarks.one_rank import one_rank
from dtcp.distributed.mesh import Degrees
from dtcp.parallelize import ActivationCheckpoint, FullCheckpoint, NoCheckpoint
from dtcp.planner.forecast import forecast
from dtcp.planner.setup import Setup
from dtcp.planner.subject import FamilyModel, subject_of_hf
from dtcp.sequence.documents import Documents

NEAR = 0.05
"""Largest relative difference of a forecast."""

FEWER = {
    "llama3.1-8b": lambda config: replace(config, num_layers=4),
    "gemma4-31b": lambda config: replace(config, layer_types=config.layer_types[:6]),
    "qwen3.5-35b-a3b": lambda config: replace(config, num_layers=4, num_mtp_layers=0),
    "deepseek-v4-flash": lambda config: replace(
        config,
        num_layers=4,
        num_mtp_layers=0,
        num_experts=16,
        compress_ratios=config.compress_ratios[:4],
    ),
}
"""Of each model of real width, so many layers that all its weights stand on one card in fp32."""


def cases(device: str, length: int = 65_536) -> list[Case]:
    """Families under both kinds of checkpointing, and tensor parallelism once."""
    found: list[tuple[str, ActivationCheckpoint, Degrees]] = [
        (name, checkpoint, Degrees(cp=8))
        for checkpoint in (FullCheckpoint(), NoCheckpoint())
        for name in FEWER
    ]
    found.insert(4, ("llama3.1-8b", FullCheckpoint(), Degrees(cp=4, tp=2)))
    return [
        Case(
            f"{name} {type(checkpoint).__name__} cp {degrees.cp} tp {degrees.tp}",
            _case(name, checkpoint, degrees, device, length),
        )
        for name, checkpoint, degrees in found
    ]


def _case(
    name: str, checkpoint: ActivationCheckpoint, degrees: Degrees, device: str, length: int
) -> Callable[[], dict[str, Any]]:
    def run() -> dict[str, Any]:
        whole = subject_of_hf(name)
        assert isinstance(whole, FamilyModel)
        subject = replace(whole, config=FEWER[name](whole.config))
        setup = Setup(degrees, Documents.single(1, length), checkpoint=checkpoint)
        try:
            return compared(subject, setup, device)
        except NotImplementedError as refused:
            # A model may need a newer torch than there is here, and says so.
            return {"refused": str(refused)}

    return run


def compared(
    subject: FamilyModel, setup: Setup, device: str, peak: Callable[[], int] | None = None
) -> dict[str, Any]:
    """What a step held and what was forecast of it.

    Args:
        peak: bytes at most since the last call; None for those of CUDA's allocator.
    """
    peak = peak or _cuda_peak
    memory = forecast(subject, setup, ranks=[0]).memory
    with one_rank(subject, setup, device=device) as step:
        step()
        peak()
        step()
        held = peak()
    ratio = memory.total / held
    return {
        "held_GB": held / 1e9,
        "forecast_GB": memory.total / 1e9,
        "ratio": ratio,
        "where": memory.where,
        "right": abs(ratio - 1) <= NEAR,
    }


def _cuda_peak() -> int:
    most = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return most
