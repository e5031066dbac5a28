"""Steps of real ranks that share the card, over gloo, against one device.

The whole path of a run on many cards: a model and its plan, FSDP, compiled blocks, strategies and
their transfers, which go through host memory. Loss and every gradient, in fp32.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m benchmarks.gpu.shared \\
        "llama ring 2 ranks" cpu
"""

import copy
import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from benchmarks.gpu.candidates import candidates
from benchmarks.gpu.errors import relative_error, worst
from benchmarks.gpu.problems import Case
from benchmarks.gpu.processes import run_ranks
from benchmarks.gpu.wheels import add_packages
from dtcp import Degrees, Documents, ParallelMesh, batch_metadata, shard_batch
from dtcp.labels import shift_labels
from dtcp.loss import global_token_count, token_mean_loss
from dtcp.models import deepseek_v4, gemma4, llama, qwen3_5
from dtcp.parallelize import Compile, parallelize
from dtcp.parallelize.plans.families import FAMILIES
from dtcp.sequence.layout import HeadTail
from dtcp.softmax import AllGatherAttention, RingAttention, UlyssesAttention

SECONDS = 65.0
"""Less than the stage has after its start, so that ranks that hang get a line with their error."""
LOSS_BOUND, GRADIENT_BOUND = 1e-4, 5e-3
"""Of fp32: norms of differences, relative to those of one device's loss and gradients."""
SEQ_LEN = 256
ROWS = ((70, 130, 56), (256,), (1, 200, 40), (100, 100))


TINY: dict[str, Any] = {
    "llama": llama.PRESETS["tiny"],
    "gemma4": gemma4.PRESETS["tiny"],
    "qwen3_5": qwen3_5.PRESETS["tiny"],
    "deepseek_v4": deepseek_v4.PRESETS["tiny"],
}
"""Models of a few thousand parameters."""
STRATEGIES = {"ring": RingAttention, "all-gather": AllGatherAttention, "ulysses": UlyssesAttention}


class Step(NamedTuple):
    """A model on ranks."""

    family: str
    strategy: str
    degrees: Degrees
    compiled: bool = False

    @property
    def ranks(self) -> int:
        return self.degrees.cp * self.degrees.dp_shard

    def __str__(self) -> str:
        sharded = f", dp {self.degrees.dp_shard}" if self.degrees.dp_shard > 1 else ""
        text = f"{self.family} {self.strategy} {self.ranks} ranks{sharded}"
        return f"{text} compiled" if self.compiled else text


STEPS = {
    str(step): step
    for step in (
        Step("llama", "ring", Degrees(cp=2)),
        Step("llama", "ring", Degrees(cp=2), compiled=True),
        Step("gemma4", "all-gather", Degrees(cp=2)),
        Step("qwen3_5", "ring", Degrees(cp=2)),
        Step("deepseek_v4", "ring", Degrees(cp=2)),
        Step("llama", "ring", Degrees(dp_shard=2, cp=2)),
        Step("llama", "ulysses", Degrees(cp=2)),
        Step("llama", "all-gather", Degrees(cp=4), compiled=True),
    )
}


def cases(device: str) -> list[Case]:
    """Each by processes of its own."""
    return [Case(name, _launch(name, step, device)) for name, step in STEPS.items()]


def _launch(name: str, step: Step, device: str) -> Callable[[], dict[str, Any]]:
    def run() -> dict[str, Any]:
        return run_ranks(step.ranks, "benchmarks.gpu.shared", [name, device], SECONDS)

    return run


def compared(step: Step, device: str) -> dict[str, Any]:
    """The largest errors of this rank's loss and gradients; both models hold the same weights."""
    torch.manual_seed(0)
    config = TINY[step.family]
    model = FAMILIES[step.family].model(config)
    model.init_weights()  # type: ignore[operator]
    model = model.to(device)
    alone = copy.deepcopy(model)
    expected = _step_alone(alone, config.vocab_size, device)
    mesh = ParallelMesh.from_degrees(step.degrees, device)
    plan = FAMILIES[step.family].plan(config, mesh, STRATEGIES[step.strategy], HeadTail)
    parallelize(model, mesh, plan, compile=Compile() if step.compiled else None)
    loss = _step_on(model, mesh, config.vocab_size, device)
    grads = [(x.grad, y.grad) for x, y in zip(model.parameters(), alone.parameters(), strict=True)]
    if any((x is None) != (y is None) for x, y in grads):
        raise RuntimeError("a parameter has a gradient on one device or on ranks alone")
    pairs = [
        (x.full_tensor() if isinstance(x, DTensor) else x, y)
        for x, y in grads
        if x is not None and y is not None
    ]
    # Of some parameters the gradient is all but zero, and fp32 has no digits of it.
    usual = sum(float(right.norm()) for _, right in pairs) / len(pairs)
    of_gradients = worst(relative_error(*pair, least=1e-2 * usual) for pair in pairs)
    of_loss = relative_error(loss, expected)
    right = of_loss <= LOSS_BOUND and of_gradients <= GRADIENT_BOUND
    return {"loss": of_loss, "gradients": of_gradients, "compared": len(pairs), "right": right}


def _batch(vocabulary: int) -> tuple[dict[str, Tensor], Documents]:
    documents = Documents(ROWS, SEQ_LEN)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (len(ROWS), SEQ_LEN), generator=generator)
    labels = shift_labels(ids, documents)
    batch = {"input_ids": ids, "labels": labels, "position_ids": documents.position_ids()}
    return batch, documents


def _step_alone(model: nn.Module, vocabulary: int, device: str) -> Tensor:
    batch, documents = _batch(vocabulary)
    metadata = batch_metadata(model, documents).to(device)
    logits = model(batch["input_ids"].to(device), batch["position_ids"].to(device), metadata)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten().to(device))
    loss.backward()
    return loss.detach()


def _step_on(model: nn.Module, mesh: ParallelMesh, vocabulary: int, device: str) -> Tensor:
    batch, _ = _batch(vocabulary)
    mine = slice(mesh.rank("batch"), None, mesh.size("batch"))
    local, sharded = shard_batch(
        {name: x[mine] for name, x in batch.items()},
        mesh,
        model=model,
        documents=Documents(ROWS[mine], SEQ_LEN),
        device=device,
    )
    tokens = global_token_count(local["labels"], mesh.loss)
    logits = model(local["input_ids"], local["position_ids"], sharded.attn_metadata)
    loss = token_mean_loss(logits, local["labels"], tokens)
    loss.backward()
    loss = loss.detach()
    if mesh.loss is not None:
        dist.all_reduce(loss, group=mesh.loss.get_group())
    return loss


def main(name: str, device: str) -> None:
    """One rank: rank 0 prints the worst of all ranks as a line of JSON."""
    add_packages()
    if device == "cuda":
        # All ranks are on the first card, which a mesh would otherwise take by LOCAL_RANK.
        torch.cuda.set_device(0)
        torch.cuda.init()
    dist.init_process_group("gloo")
    # Of fla's candidates one: eighty compile for minutes, and all of them compute the same.
    with candidates(3, 1000):
        result = compared(STEPS[name], device)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, result)
    if dist.get_rank() == 0:
        largest = {key: worst(each[key] for each in every) for key in ("loss", "gradients")}
        right = all(each["right"] for each in every)
        print(json.dumps({**largest, "compared": result["compared"], "right": right}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
