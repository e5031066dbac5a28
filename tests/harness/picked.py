"""Layers that read what an indexer picks, held against dense attention to it, in fp64."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.testing import assert_close

from dtcp.batch import shard_batch
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import ParallelMesh
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import SequenceLayout
from dtcp.sharded_batch import ShardedBatch


class Truth(NamedTuple):
    """What a layer reads, of whole rows, and what comes of it."""

    inputs: Any  # a NamedTuple of tensors; its first fields have gradients
    grad_out: Tensor
    out: Tensor
    grads: tuple[Tensor, ...]


def drawn(kind: Any, shapes: list[tuple[int, ...]]) -> Any:
    """Random inputs, on every rank alike."""
    draw = torch.Generator().manual_seed(4)
    made = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    return kind(*(x.requires_grad_() for x in made))


def keys_of_latents(x: Any, content: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, S, H, ...] of every token, made of its latent."""
    made = torch.einsum("bsc,hwc->bshw", x.latent, x.up)
    shared = x.rotary[:, :, None].expand(-1, -1, made.shape[2], -1)
    return torch.cat((made[..., :content], shared), dim=-1), made[..., content:]


def dense(
    x: Any,
    documents: Documents,
    sees: Tensor,
    kv: tuple[Tensor, Tensor],
    *,
    trained: int,
    sink: Tensor | None = None,
) -> Truth:
    """Dense attention to what queries see, [B, H or 1, S, S]; gradients of the first inputs."""
    k, v = kv
    scores = (torch.einsum("bshd,bthd->bhst", x.q, k) * 0.3).masked_fill(~sees, -torch.inf)
    if sink is not None:
        scores = torch.cat((scores, sink[:, None, None].expand(*scores.shape[:-1], 1)), dim=-1)
    weights = scores.softmax(-1)[..., : sees.shape[-1]].masked_fill(~sees, 0.0)
    out = torch.einsum("bhst,bthv->bshv", weights, v)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    grad_out = grad_out * (documents.document() >= 0)[..., None, None]
    grads = torch.autograd.grad(out, x[:trained], grad_out)
    return Truth(type(x)(*(each.detach() for each in x)), grad_out, out.detach(), grads)


def sharded_for(
    layer: nn.Module, mesh: Any, documents: Documents, layout: type[SequenceLayout]
) -> ShardedBatch:
    """A batch of these rows, cut for a layer."""
    batch = {"input_ids": torch.zeros(documents.batch, documents.seq_len, dtype=torch.int64)}
    on = ParallelMesh.from_device_mesh(mesh)
    return shard_batch(batch, on, layout, model=layer, documents=documents)[1]


def step(layer, mesh, expected, documents, layout, *, weights=(), call=None):
    """Hold output and every gradient against the truth; what moved, there and back.

    Args:
        weights: names of inputs that are no tokens': each rank has the share of its own queries.
    """
    sharded = sharded_for(layer, mesh, documents, layout)
    parts = (
        x if name in weights else sharded.shard(x) for name, x in expected.inputs._asdict().items()
    )
    mine = type(expected.inputs)(*(x.clone().requires_grad_() for x in parts))
    with count_traffic() as there:
        out = (layer if call is None else call)(mine, sharded.attn_metadata)
    with count_traffic() as back:
        grads = torch.autograd.grad(out, mine, sharded.shard(expected.grad_out), allow_unused=True)
    assert_close(out, sharded.shard(expected.out))
    trained = len(expected.grads)
    assert grads[trained:] == (None,) * (len(mine) - trained)
    for name, actual, whole in zip(mine._fields, grads, expected.grads, strict=False):
        if name in weights:
            dist.all_reduce(actual)
        assert_close(actual, whole if name in weights else sharded.shard(whole))
    return sharded, there, back


def tokens_of_others_in_sight(documents: Documents, ranks: int) -> list[int]:
    """Of contiguous shards, one row: left of each, in the document that its border cuts."""
    document, length = documents.document()[0], documents.seq_len // ranks
    return [
        int((document[: rank * length] == document[rank * length]).sum()) for rank in range(ranks)
    ]
