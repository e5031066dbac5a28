"""The training step of one rank as it is run, on a process group where nobody answers.

What other ranks would have sent is whatever stands in memory: good for what a step allocates, and
for nothing else.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from dtcp._torch.fakes import fake_ranks
from dtcp.distributed.mesh import ParallelMesh
from dtcp.loss import token_mean_loss
from dtcp.parallelize import FSDP, parallelize
from dtcp.planner.setup import Setup
from dtcp.planner.subject import Subject


@contextmanager
def one_rank(
    subject: Subject, setup: Setup, *, cp_rank: int = 0, device: str = "cpu"
) -> Iterator[Callable[[], None]]:
    """Yields what runs a step: forward and backward of each micro-batch, then AdamW.

    The second step is like all that follow: the optimizer's states are there.
    """
    degrees, precision = setup.degrees, setup.precision
    with fake_ranks(degrees.world, cp_rank * degrees.tp):
        nodes = setup.ranks_per_node
        mesh = ParallelMesh.from_degrees(degrees, device, ranks_per_node=nodes)
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(precision.master)
        try:
            with torch.device(device):
                model = subject.build()
        finally:
            torch.set_default_dtype(before)
        plan = subject.plan(model, mesh, setup.attention, setup.layout)
        policy = MixedPrecisionPolicy(precision.compute, precision.reduce)
        fsdp = FSDP(mixed_precision=policy, reshard_after_forward=setup.reshard)
        parallelize(model, mesh, plan, activation_checkpoint=setup.checkpoint, fsdp=fsdp)
        model.train()
        local, sharded = subject.batch(model, mesh, setup.layout, setup.documents)
        local = {key: x.to(device) for key, x in local.items()}
        sharded = replace(sharded, attn_metadata=sharded.attn_metadata.to(device))
        on_host = device == "cpu"
        optimizer = torch.optim.AdamW(model.parameters(), fused=not on_host, foreach=False)

        def step() -> None:
            optimizer.zero_grad()
            for _ in range(setup.micro_batches):
                logits = subject.logits(model, local, sharded)
                losses = [token_mean_loss(x, local["labels"], setup.tokens) for x in logits]
                del logits
                sum(losses[1:], losses[0]).backward()
            optimizer.step()

        yield step
