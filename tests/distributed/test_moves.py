"""What every op says it moves is what it is counted to move, peer by peer."""

import pytest
import torch
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dtcp.distributed.ledger import count_traffic
from dtcp.distributed.moves import Moved
from dtcp.distributed.ops import moves_of
from dtcp.recurrent import GatedLinearCP
from dtcp.sequence.layout import HeadTail
from dtcp.softmax import AllGatherAttention, HybridAttention, RingAttention
from tests.harness import packings
from tests.harness.attention_parity import PREFIX, Case, local_inputs, mixer_on, shard_case, styles
from tests.harness.spmd import spmd
from tests.recurrent import test_linear as mamba
from tests.softmax import test_cross as cross
from tests.softmax import test_latent as latent


class Stated(TorchDispatchMode):
    """Adds up what the outermost ops say."""

    def __init__(self):
        super().__init__()
        self.moved = Moved()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            # It comes by again, on local tensors.
            return NotImplemented
        if (moves := moves_of(func)) is not None:
            self.moved += moves(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@spmd(ranks=(2, 4))
def test_ops_move_what_they_say_and_ranks_agree_on_every_pair(mesh, ranks):
    case = Case(PREFIX, packings.across_borders, seq_len=64, sink=False)
    for style in styles(ranks)[:-1]:
        mixer = mixer_on(mesh, style, PREFIX.mask)
        sharded = shard_case(case, mixer, mesh, HeadTail)
        q, k, v = inputs = local_inputs(case, sharded)
        with Stated() as stated, count_traffic() as traffic:
            out = mixer(q, k, v, sharded.attn_metadata)
            torch.autograd.grad(out, inputs, torch.ones_like(out))
        moved = stated.moved
        assert (sum(moved.sent), sum(moved.received)) == (traffic.sent, traffic.received), style
        assert moved.workspace > 0
        everyones = [None] * ranks
        dist.all_gather_object(everyones, moved)
        for peer, other in enumerate(everyones):
            assert other.sent[mesh.get_local_rank()] == moved.received[peer], style
        if isinstance(style, HybridAttention) and 1 < style.inner_ranks < ranks:
            of_nodes = moved.crossing(mesh.get_local_rank(), style.inner_ranks)
            assert 0 < of_nodes[1] < traffic.received


@spmd(ranks=2)
def test_latent_cross_and_linear_ops_move_what_they_say(mesh):
    """Latents, keys of another sequence, states that are scaled: the same sums."""
    case, linear = latent.LatentCase(packings.two_rows), packings.across_borders(48, 2)
    mixer = latent.claimed(mesh, RingAttention(), case)
    sharded, inputs, _ = latent.sharded_inputs(case, mixer, mesh, HeadTail)
    calls = [(mixer, inputs, sharded)]
    for style in (RingAttention(), AllGatherAttention()):
        mixer = cross.claimed(mesh, style)
        queries, keys = cross.sharded_pair(cross.TWO_ROWS, mixer, mesh, cross.LAYOUTS[2])
        q, k, v = cross.truth(cross.TWO_ROWS).inputs
        local = (queries.shard(q), keys.shard(k), keys.shard(v))
        calls.append((mixer, [x.requires_grad_() for x in local], queries))
    mixer = mamba.claimed(mesh, GatedLinearCP())
    sharded = mamba.shard_case(linear, mixer, mesh, HeadTail)
    whole = mamba.truth(linear, "mamba").inputs
    calls.append((mixer, [sharded.shard(x).requires_grad_() for x in whole], sharded))
    for mixer, inputs, sharded in calls:
        with Stated() as stated, count_traffic() as traffic:
            out = mixer(*inputs, sharded.attn_metadata)
            torch.autograd.grad(out, inputs, torch.ones_like(out))
        moved = stated.moved
        assert (sum(moved.sent), sum(moved.received)) == (traffic.sent, traffic.received), mixer
        assert traffic.received > 0 and moved.workspace > 0


@pytest.mark.parametrize("rank", range(6))
def test_bytes_that_cross_nodes_are_those_of_ranks_elsewhere(rank):
    moved = Moved((1, 2, 4, 8, 16, 32), (32, 16, 8, 4, 2, 1))
    sent, received = moved.crossing(rank, 2)
    own = rank // 2 * 2
    assert sent == 63 - moved.sent[own] - moved.sent[own + 1]
    assert received == 63 - moved.received[own] - moved.received[own + 1]
