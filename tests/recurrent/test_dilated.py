"""A convolution whose taps are several tokens apart equals torch's own, document by document."""

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn import functional as F
from torch.testing import assert_close

from dtcp.batch import shard_batch
from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.mesh import ParallelMesh
from dtcp.mixer_metadata import batch_metadata
from dtcp.recurrent import CausalConv1d, CausalConvCP
from dtcp.recurrent.moves import ChannelShape
from dtcp.sequence.block_balanced import BlockBalanced
from dtcp.sequence.document_balanced import DocumentBalanced
from dtcp.sequence.documents import Documents
from dtcp.sequence.layout import Contiguous, HeadTail
from dtcp.sequence.per_document import PerDocument
from tests.harness.spmd import spmd

WIDTH, DILATION, CHANNELS, SEQ_LEN = 3, 3, 4, 56
PACKED = Documents(((5, 1, 29, 17), (40, 12)), SEQ_LEN)


def truth():
    """Operands and a cotangent of whole rows, and what torch makes of each document: fp64."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, SEQ_LEN, CHANNELS), (CHANNELS, WIDTH), (2, SEQ_LEN, CHANNELS)]
    x, weight, cotangent = (torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    cotangent = cotangent * (PACKED.document() >= 0)[..., None]
    rows = []
    for row, lengths in zip(x, PACKED.lengths, strict=True):
        parts = [
            F.pad(part.mT, ((WIDTH - 1) * DILATION, 0))
            for part in row.split((*lengths, SEQ_LEN - sum(lengths)))
        ]
        options = {"dilation": DILATION, "groups": CHANNELS}
        rows.append(torch.cat([F.conv1d(p, weight[:, None], **options) for p in parts], dim=1).mT)
    out = torch.stack(rows) * (PACKED.document() >= 0)[..., None]
    grads = torch.autograd.grad(out, (x, weight), cotangent)
    return x.detach(), weight.detach(), cotangent, out.detach(), grads


def test_one_device_equals_torch():
    x, weight, cotangent, out, grads = truth()
    mixer = CausalConv1d(WIDTH, dilation=DILATION)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    actual = mixer(x, weight, batch_metadata(mixer, PACKED))
    actual = actual * (PACKED.document() >= 0)[..., None]
    assert_close(actual, out)
    assert_close(torch.autograd.grad(actual, (x, weight), cotangent), grads)


@pytest.mark.slow_where(lambda ranks: ranks != 2)
@spmd(ranks=(2, 4))
def test_ranks_equal_torch_and_receive_the_reach_of_the_taps(mesh, ranks):
    """In every layout; six tokens from the left of each segment, and as much back."""
    whole, kernel, cotangent, out, grads = truth()
    layer = nn.ModuleDict({"conv": CausalConv1d(WIDTH, dilation=DILATION)})
    parallelize_module(layer, mesh, {"conv": CausalConvCP()})
    mixer, on = layer["conv"], ParallelMesh.from_device_mesh(mesh)
    batch = {"input_ids": torch.zeros(2, SEQ_LEN, dtype=torch.int64)}
    for layout in (Contiguous, HeadTail, PerDocument, BlockBalanced, DocumentBalanced):
        sharded = shard_batch(batch, on, layout, model=layer, documents=PACKED)[1]
        x = sharded.shard(whole).clone().requires_grad_()
        weight = kernel.clone().requires_grad_()
        real = sharded.shard((PACKED.document() >= 0)[..., None])
        with count_traffic() as there:
            actual = mixer(x, weight, sharded.attn_metadata) * real
        with count_traffic() as back:
            dx, dweight = torch.autograd.grad(actual, (x, weight), sharded.shard(cotangent))
        assert_close(actual, sharded.shard(out))
        assert_close(dx, sharded.shard(grads[0]))
        dist.all_reduce(dweight)
        assert_close(dweight, grads[1])
        rank, shape = mesh.get_local_rank(), ChannelShape(2, CHANNELS, 8)
        moved = mixer.style.received(mixer, sharded.coords, sharded.layout, rank, shape)
        assert (there.received, back.received) == (moved.forward, moved.backward)
        if layout is Contiguous:
            reach = (WIDTH - 1) * DILATION * 2 * CHANNELS * 8
            assert there.received == (reach if rank > 0 else 0)
